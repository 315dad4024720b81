"""Files below a data set's folder: one look into each folder, however many files are asked for, and no way out of it."""

import os
from pathlib import Path, PurePosixPath


class Tree:
    """The files below a folder, as they were when its folders were first looked into.

    Symbolic links are followed as long as they stay below the folder; that the folder itself is one is allowed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._top = Path(os.path.realpath(root))
        self._content: dict[str, tuple[Path, dict[str, bool], list[str]]] = {}

    def folders(self, folder: str = ".") -> list[str]:
        """Names of the folders in ``ROOT/FOLDER``, sorted; raises ``ValueError`` where it leads out of ``ROOT``."""
        return self._look(folder)[2]

    def files(self, folder: str = ".") -> list[str]:
        """Names of what else is in ``ROOT/FOLDER``, sorted; raises ``ValueError`` where it leads out of ``ROOT``."""
        return sorted(self._look(folder)[1])

    def real(self, folder: str, name: str) -> Path | None:
        """Where the file ``ROOT/FOLDER/NAME`` really is; None if there is none.

        Raises:
            ValueError: it leads out of ``ROOT``, or the folder cannot be read.
        """
        place, link_by_name, _ = self._look(folder, name)
        link = link_by_name.get(name)
        if link:
            file = self._inside(place / name, folder, name)
            return file if file.is_file() else None
        return None if link is None else place / name

    def _look(self, folder: str, name: str = "") -> tuple[Path, dict[str, bool], list[str]]:
        """Where a folder really is, its files' names and whether each is a link, and its folders' names.

        ``name``: of the file that is looked for, for the message.
        """
        if folder not in self._content:
            place = self._inside(self.root / folder, folder, name)
            link_by_name, folders = {}, []
            try:
                with os.scandir(place) as entries:
                    for entry in entries:
                        if _is_folder(entry):
                            folders.append(entry.name)
                        elif entry.is_symlink() or entry.is_file():
                            link_by_name[entry.name] = entry.is_symlink()
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                raise ValueError(f"cannot read the folder {place}: {error.strerror}") from error
            self._content[folder] = place, link_by_name, sorted(folders)
        return self._content[folder]

    def _inside(self, place: Path, *called: str) -> Path:
        real = Path(os.path.realpath(place))
        if not real.is_relative_to(self._top):
            raise ValueError(f"{PurePosixPath(*called)} leads out of {self.root}, to {real}")
        return real


def folder_with(root: Path, folders: tuple[str, ...], pattern: str) -> Path | None:
    """The first of ``ROOT/FOLDER`` that holds a file of that name, ``*`` standing for anything."""
    return next((root / f for f in folders if any((root / f).glob(pattern))), None)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
