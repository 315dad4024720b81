"""Reading bytes that lie elsewhere: at a path, behind http(s)://, or wherever fsspec reaches. What is read is not trusted here.

http and https are read by Python itself; the others by fsspec, which comes with PyTorch, and the package that it names for a
scheme (s3fs, gcsfs, adlfs, ..).
"""

import errno
import fcntl
import hashlib
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

CHUNK = 1 << 20
WAITS = (1.0, 4.0, 16.0)  # seconds before the second, third and fourth attempt
_TIMEOUT = 60.0  # seconds without a byte
_POLL = 0.2  # seconds between looks at a lock that another process holds
_HTTP = ("http", "https")
_OTHERS = ("file", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hdfs", "webhdfs", "oci", "oss")
_SCHEMES = (*_HTTP, *_OTHERS, "sftp", "ssh", "smb", "ftp")  # others of fsspec's put one into another, or run code
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PASSES = (408, 425, 429)  # HTTP: answers below 500 after which another attempt may succeed
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_T = TypeVar("_T")


class Unreachable(OSError):
    """Could not be read just now; another attempt may succeed."""


def is_url(place: str) -> bool:
    """Whether it is written as a URL: ``scheme://..``."""
    return bool(_SCHEME.match(place))


def shown(place: str) -> str:
    """A place as messages name it: without a user's name, a password, or what stands behind ``?`` in http(s)."""
    if not is_url(place):
        return place
    scheme, rest = place.split("://", 1)
    if scheme.lower() in _HTTP:
        rest = rest.partition("?")[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def sibling(place: str, name: str) -> str:
    """The place of a file called ``name`` in the same folder."""
    if not is_url(place):
        return str(Path(place).with_name(name))
    of_http = _scheme(place) in _HTTP
    head, mark, query = place.partition("?") if of_http else (place, "", "")
    return f"{head.rpartition('/')[0]}/{urllib.parse.quote(name) if of_http else name}{mark}{query}"


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL that is not http(s), and the path in it.

    Raises:
        ValueError: a scheme that is not known, or whose package is not installed.
    """
    import fsspec  # slow to import, and few need it

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{shown(url)}: a package for {_scheme(url)}:// is missing here ({error})") from None


def chunks(place: str, *, limit: int) -> Iterator[bytes]:
    """The bytes of a file, in parts of a MiB.

    Args:
        place: a path or a URL.
        limit: bytes; a larger file is refused, whatever size its server tells beforehand.

    Raises:
        Unreachable: the network, a timeout, a server's trouble, or fewer bytes than were announced.
        ValueError: there is no such file, it may not be read, or it is larger than ``limit``.
    """
    name = shown(place)
    try:
        with _opened(place) as (file, size):
            at = 0
            while at <= limit:
                if size is not None and size > limit:
                    raise ValueError(f"{name} has {size} bytes, and {limit} are the most that are taken from it")
                chunk = file.read(min(CHUNK, limit + 1 - at))
                if not chunk:
                    break
                at += len(chunk)
                yield chunk
            if at > limit:
                raise ValueError(f"{name} has more than {limit} bytes, the most that are taken from it")
            if size is not None and at < size:
                raise Unreachable(f"cannot read {name}: it ended after {at} of {size} bytes")
    except (ValueError, Unreachable):
        raise
    except urllib.error.HTTPError as error:
        kind = Unreachable if error.code in _PASSES or error.code >= 500 else ValueError
        raise kind(f"cannot read {name}: HTTP status {error.code}, {error.reason}") from None
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"cannot read {name}: {error.strerror or 'there is no such file'}") from None
    except Exception as error:  # each of fsspec's packages has its own
        raise Unreachable(f"cannot read {name}: {' '.join(str(error).split())[:200] or type(error).__name__}") from None


def patiently(work: Callable[[], _T], pause: Callable[[float], Any] = time.sleep) -> _T:
    """What ``work`` gives; tried again, after growing waits, where it is ``Unreachable``.

    Args:
        work: does it.
        pause: waits for so many seconds.

    Raises:
        ValueError: it stays so.
    """
    for wait in WAITS:
        try:
            return work()
        except Unreachable:
            pause(wait)
    try:
        return work()
    except Unreachable as error:
        raise ValueError(f"{error} (tried {len(WAITS) + 1} times)") from None


def read_small(place: str, *, limit: int) -> bytes:
    """A whole file, patiently; raises ``ValueError`` as :func:`chunks` does, or where it cannot be reached."""
    return patiently(lambda: b"".join(chunks(place, limit=limit)))


def sha256_of(path: Path) -> str:
    """Of a file's content; the file is not read into memory as a whole."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_file(place: str, path: Path, *, sha256: str, limit: int) -> Path:
    """Brings a file to ``path``, once, whichever of several processes asks: the file is whole and right, or not there.

    Args:
        place: its URL.
        path: where it is to be. What is there already is compared with ``sha256``, and fetched again if it is damaged.
        sha256: of its content, or the first digits of it.
        limit: bytes, see :func:`chunks`.

    Raises:
        ValueError: it cannot be read, is too large, has another SHA-256, or cannot be written.
    """
    assert sha256
    if path.is_file() and sha256_of(path).startswith(sha256.lower()):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")) as alone:
            if path.is_file() and sha256_of(path).startswith(sha256.lower()):
                return path
            part = path.with_name(f".{path.name}.part" if alone else f".{path.name}.{os.getpid()}.part")
            try:
                found = patiently(lambda: _copied(place, part, limit))
                if not found.startswith(sha256.lower()):
                    raise ValueError(f"{shown(place)} has the SHA-256 {found}, not {sha256}: it is another file")
                part.replace(path)
                sync_folder(path.parent)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot keep {shown(place)} at {path}: {error.strerror or error}") from None
    return path


@contextmanager
def locked(path: Path, waiting: Callable[[], Any] | None = None) -> Iterator[bool]:
    """Only one process at a time is inside; the lock goes with the process, and its file with the last one.

    Args:
        path: of the lock's file.
        waiting: called once if another process is inside.

    Yields:
        Whether the file system has locks.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            alone = _take(handle, waiting)
            waiting = None
            with suppress(FileNotFoundError):
                if not alone or os.stat(path).st_ino == os.fstat(handle).st_ino:
                    break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # who was inside has removed the file that was waited for
    try:
        yield alone
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """A renamed file has its name for good afterwards."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take(handle: int, waiting: Callable[[], Any] | None) -> bool:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if waiting:
                waiting()
            waiting = None
            time.sleep(_POLL)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            raise


def _copied(place: str, part: Path, limit: int) -> str:
    """Writes what lies at ``place`` to the disk; its SHA-256."""
    digest = hashlib.sha256()
    with open(part, "wb") as out:
        for chunk in chunks(place, limit=limit):
            out.write(chunk)
            digest.update(chunk)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


@contextmanager
def _opened(place: str) -> Iterator[tuple[IO[bytes], int | None]]:
    """A file to read, and its size in bytes, where that is told beforehand."""
    if not is_url(place):
        with open(place, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
        return
    scheme = _scheme(place)
    if scheme in _HTTP:
        request = urllib.request.Request(place, headers={"User-Agent": "fasttrain"})
        with _opener().open(request, timeout=_TIMEOUT) as answer:
            length = answer.headers.get("Content-Length", "")
            yield answer, int(length) if length.isdecimal() else None
        return
    check_scheme(place)
    system, path = file_system(place)
    with system.open(path, "rb") as file:
        yield file, int(file.size) if getattr(file, "size", None) is not None else None


def check_scheme(url: str) -> None:
    """Raises ``ValueError`` where a URL's scheme is none that is read, or where it is a chain of several."""
    if _scheme(url) not in _SCHEMES or "::" in url:
        raise ValueError(f"{shown(url)}: URLs begin with {', '.join(_SCHEMES)}, and one is not put into another")


def _opener() -> urllib.request.OpenerDirector:
    """Reads http and https, and follows from one to the other, but nowhere else: not to files, not to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
