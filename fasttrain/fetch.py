"""What a recipe takes from elsewhere: nothing, unless it names a URL, or a library's weights, with a hash.

What was fetched lies in ``~/.cache/fasttrain`` (``$XDG_CACHE_HOME/fasttrain``): ``weights/SHA256`` and ``data/..``.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

from .fields import Data
from .loaders.remote import LIST, fetch_packed, fetch_shards, list_place
from .loaders.urls import check_scheme, fetch_file, is_url, sha256_of, shown

MAX_WEIGHTS = 16 << 30  # bytes of a file of weights
SHORTEST = 8  # digits of a SHA-256 that libraries put into a file's name
_WHOLE = re.compile(r"[0-9a-fA-F]{64}")
_START = re.compile(rf"[0-9a-fA-F]{{{SHORTEST},64}}")
_DIGITS_IN_NAME = re.compile(rf"-([0-9a-f]{{{SHORTEST},64}})\.\w+$")


def cache_folder(name: str) -> Path:
    """``~/.cache/fasttrain/NAME``, or where ``XDG_CACHE_HOME`` says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttrain" / name


def fetch_weights(url: str, sha256: str) -> Path:
    """The weights file at a URL, fetched once: processes that ask at the same time wait for the one that fetches.

    Args:
        url: http(s), or what fsspec knows (s3://, gs://, ..).
        sha256: all 64 digits of the file's SHA-256.

    Raises:
        ValueError: no whole SHA-256, a URL that cannot be read, a file above 16 GiB, or one with another SHA-256.
    """
    check_scheme(url)
    if not _WHOLE.fullmatch(sha256):
        raise ValueError(
            f"weights {shown(url)}: a URL needs sha256 beside it, all 64 digits of the file's SHA-256, and "
            f"{repr(sha256) if sha256 else 'nothing'} is there; get the file, compare it with what its publisher says, "
            "and run sha256sum FILE"
        )
    return fetch_file(url, cache_folder("weights") / sha256.lower(), sha256=sha256, limit=MAX_WEIGHTS)


def library_file(what: str, here: Sequence[Path], urls: Sequence[str], sha256: str) -> Path:
    """The file of weights that a library offers: on this machine, or fetched because the recipe says which it is to be.

    Args:
        what: the weights, for messages.
        here: where the file may be already; the first is where a URL's file goes whose name ends in digits of its hash.
        urls: where it is published, best first.
        sha256: of the file, or its first digits; empty: only what is here is taken.

    Raises:
        ValueError: it is not here and may not be fetched, or cannot be.
    """
    found = [path for path in here if path.is_file()]
    for path in found:
        if not sha256 or sha256_of(path).startswith(sha256.lower()):
            return path
    if _START.fullmatch(sha256):
        for url in urls:
            digits = _DIGITS_IN_NAME.search(url)
            if digits and (digits[1].startswith(sha256.lower()) or sha256.lower().startswith(digits[1])):
                folder = next(path for path in here if path.name == file_name(url)).parent
                return fetch_file(url, folder / file_name(url), sha256=sha256, limit=MAX_WEIGHTS)
        if urls and _WHOLE.fullmatch(sha256):
            return fetch_weights(urls[0], sha256)
    if found:
        raise ValueError(f"{what}: {found[0]} has the SHA-256 {sha256_of(found[0])}, not {sha256}: it is another file")
    known = [(url, _DIGITS_IN_NAME.search(url)) for url in urls]
    told = [f"{url}, whose SHA-256 begins with {digits[1]}" if digits else url for url, digits in known]
    raise ValueError(
        f"{what} are not on this machine, and are fetched only where sha256 says which file they are to be; give its digits "
        f"(of {' or '.join(told)}; sha256sum FILE shows all 64), or a file of your own as the weights"
    )


def file_name(url: str) -> str:
    """The last part of a URL's path."""
    return PurePosixPath(unquote(urlparse(url).path)).name


def data_root(data: Data, report: Callable[[str], Any]) -> str | None:
    """Where a recipe's data lie on this machine: ``data.root``, or what is brought from there to ``data.cache``.

    Args:
        data: of the recipe.
        report: takes lines on what is being fetched.

    Raises:
        ValueError: a URL without ``data.sha256``, of another data set than ``beton``, or what fetching raises.
    """
    root, cache, sha256 = data.root, data.cache, data.sha256
    if root is None or (not is_url(root) and cache is None and not sha256 and not root.endswith(LIST)):
        return root
    if data.name != "beton":
        field = (
            f"data.root: {shown(root)} is a URL" if is_url(root) else f"data.{'cache' if cache else 'sha256'} is given"
        )
        raise ValueError(
            f"{field}, and data.name is {data.name}: only packed files are fetched (beton, fasttrain pack)"
        )
    if sha256 and not _WHOLE.fullmatch(sha256):
        raise ValueError(f"data.sha256: {sha256!r} is not the 64 digits that `fasttrain shard` prints")
    folder = Path(cache).expanduser() if cache else cache_folder("data")
    if is_url(root):
        if not sha256:
            raise ValueError(
                f"data.root: {shown(root)} is a URL, which needs data.sha256: the digits that `fasttrain shard` printed "
                "(those of `sha256sum NAME.beton.shards.json`)"
            )
        check_scheme(root)
        return str(fetch_shards(list_place(root), sha256=sha256, cache=folder, report=report))
    path = Path(root).expanduser()
    place = Path(list_place(str(path)))
    if place.is_file() or sha256:
        return str(fetch_shards(str(place), sha256=sha256, cache=folder, report=report))
    if not path.is_file():
        raise ValueError(f"data.root: there is no file {path}")
    return str(fetch_packed(path, cache=folder, report=report))
