"""Packed files in pieces: cut, sent, fetched once, gone on with after kill -9, and nothing believed that a list says."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest
from fasttrain.loaders import open_dataset, remote, urls
from fasttrain.loaders.pack import pack
from fasttrain.loaders.remote import fetch_packed, fetch_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasttrain.sharding import main, shard

SIZE = 1 << 19  # bytes of a piece


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A file of a few MiB."""
    path = tmp_path_factory.mktemp("packed") / "toy.beton"
    pack(open_dataset("toy"), path, raw=True, workers=1)
    return path


@pytest.fixture(scope="module")
def shared(packed, tmp_path_factory) -> tuple[Path, str]:
    """A folder with its pieces, and the SHA-256 of their list."""
    folder = tmp_path_factory.mktemp("shared")
    about = shard(packed, str(folder), size=SIZE)
    assert about["pieces"] == about["sent"] == -(-packed.stat().st_size // SIZE) > 4
    return folder, about["sha256"]


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(urls, "WAITS", (0.01, 0.01))


class Server(ThreadingHTTPServer):
    """Gives the files of a folder, and counts what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        self.fails: Counter[str] = Counter()  # answers with status 503 that are left, by name
        self.cut: Counter[str] = Counter()  # answers that end in the middle
        self.wait = 0.0  # seconds before each answer
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.asked[name] += 1
        time.sleep(self.server.wait)
        if self.server.fails[name] > 0:
            self.server.fails[name] -= 1
            self.send_error(503)
        elif self.server.cut[name] > 0:
            self.server.cut[name] -= 1
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
        elif name == "away":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def serve() -> Iterator:
    servers = []

    def start(folder: Path) -> Server:
        server = Server(folder)
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def copy_of(shared: tuple[Path, str], to: Path) -> Path:
    shutil.copytree(shared[0], to)
    return to


def listed(folder: Path, **changes) -> tuple[str, str]:
    """Changes a list; its place and its new SHA-256."""
    path = folder / "toy.beton.shards.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_what_is_fetched_is_what_was_packed(packed, shared, tmp_path, serve):
    """From a folder, a file:// URL, memory:// and http://; the second call asks nobody."""
    folder, digest = shared
    memory = fsspec.filesystem("memory")
    assert shard(packed, "memory://pieces/of", size=SIZE)["sha256"] == digest
    server = serve(folder)
    for i, place in enumerate((str(folder), f"file://{folder}", "memory://pieces/of", server.url)):
        told: list[str] = []
        where = f"{place}/toy.beton.shards.json"
        out = fetch_shards(where, sha256=digest, cache=tmp_path / str(i), report=told.append)
        assert out == tmp_path / str(i) / digest[:16] / "toy.beton"
        assert out.read_bytes() == packed.read_bytes()
        assert names(tmp_path / str(i)) == [".list.json", "toy.beton", "toy.beton.json"]
        assert told[0].startswith("toy.beton: fetching ") and told[-1].endswith("MiB/s")
        assert fetch_shards("http://127.0.0.1:9/x", sha256=digest, cache=tmp_path / str(i)) == out
    memory.rm("/pieces", recursive=True)
    assert set(server.asked.values()) == {1}
    ours, theirs = open_dataset("beton", out), open_dataset("beton", packed)
    assert ours.content == theirs.content and (ours.read(3) == theirs.read(3)).all()


def test_a_file_that_is_not_cut_is_copied(packed, tmp_path):
    out = fetch_packed(packed, cache=tmp_path / "cache")
    assert out.read_bytes() == packed.read_bytes() and fetch_packed(packed, cache=tmp_path / "cache") == out
    damaged = Path(shutil.copytree(packed.parent, tmp_path / "damaged")) / packed.name
    content = bytearray(packed.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"piece .*toy\.beton is damaged: its SHA-256 is not the list's"):
        fetch_packed(damaged, cache=tmp_path / "cache")
    assert "toy.beton" not in names(tmp_path / "cache")
    damaged.with_name("toy.beton.json").unlink()
    with pytest.raises(ValueError, match=r"has no toy\.beton\.json with its SHA-256"):
        fetch_packed(damaged, cache=tmp_path)


def test_short_failures_of_the_network_pass(shared, tmp_path, serve, packed):
    folder, digest = shared
    server = serve(folder)
    server.fails["toy.beton.shards.json"] = server.fails["toy.beton.00001"] = 2
    server.cut["toy.beton.00002"] = 1
    out = fetch_shards(f"{server.url}/toy.beton.shards.json?a=b", sha256=digest, cache=tmp_path)
    assert out.read_bytes() == packed.read_bytes() and server.asked["toy.beton.00001"] == 3
    server.fails["toy.beton.00001"] = 9
    message = r"cannot read http://127.*/toy\.beton\.00001: HTTP status 503, .*\(tried 3 times\)$"
    with pytest.raises(ValueError, match=message):
        fetch_shards(f"{server.url}/toy.beton.shards.json?secret", sha256=digest, cache=tmp_path / "again")
    assert "toy.beton" not in names(tmp_path / "again")


FETCH = r"""
import os, sys
from pathlib import Path
from fasttrain.loaders.remote import fetch_shards

for _ in range(int(sys.argv[5]) - 1):
    if not os.fork():
        break
path = fetch_shards(sys.argv[1], sha256=sys.argv[2], cache=Path(sys.argv[3]), workers=int(sys.argv[4]))
os.write(1, f"{path}\n".encode())
"""


def fetching(url: str, digest: str, cache: Path, workers: int, processes: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-c", FETCH, url, digest, str(cache), str(workers), str(processes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cache.parent)


def test_it_goes_on_after_kill_9(packed, shared, tmp_path, serve):
    """What was noted as finished is not asked for again, even if the note that was being written is cut off."""
    folder, digest = shared
    server = serve(folder)
    server.wait = 0.15
    url, cache = f"{server.url}/toy.beton.shards.json", tmp_path / "cache"
    process = fetching(url, digest, cache, 1)
    log = cache / digest[:16] / "toy.beton.partial.log"
    until = time.monotonic() + 60
    while not (log.is_file() and log.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    server.wait = 0.0
    finished = [int(line) for line in log.read_text().split()]
    assert "toy.beton" not in names(cache)
    with log.open("ab") as file:
        file.write(b"3")
    before = Counter(server.asked)
    out = fetch_shards(url, sha256=digest, cache=cache)
    assert out.read_bytes() == packed.read_bytes()
    assert names(cache) == [".list.json", "toy.beton", "toy.beton.json"]
    for i in range(-(-packed.stat().st_size // SIZE)):
        name = f"toy.beton.{i:05d}"
        assert server.asked[name] - before[name] == (i not in finished)


def test_what_the_disk_lost_is_fetched_again(packed, shared, tmp_path, monkeypatch):
    folder, digest = copy_of(shared, tmp_path / "origin"), shared[1]
    place = str(folder / "toy.beton.shards.json")
    (folder / "toy.beton.00003").rename(folder / "away")
    with pytest.raises(ValueError, match=r"cannot read .*toy\.beton\.00003: No such file"):
        fetch_shards(place, sha256=digest, cache=tmp_path / "cache", workers=1)
    (folder / "away").rename(folder / "toy.beton.00003")
    with (tmp_path / "cache" / digest[:16] / "toy.beton.partial").open("r+b") as file:
        file.write(b"damaged")
    told: list[str] = []
    out = fetch_shards(place, sha256=digest, cache=tmp_path / "cache", report=told.append)
    assert out.read_bytes() == packed.read_bytes()
    assert any("1 pieces changed on the disk and are fetched again" in line for line in told)


def test_four_processes_fetch_each_piece_once(packed, shared, tmp_path, serve):
    folder, digest = shared
    server = serve(folder)
    server.wait = 0.1
    url = f"{server.url}/toy.beton.shards.json"
    (tmp_path / "cache").mkdir()
    out, err = fetching(url, digest, tmp_path / "cache", 2, 4).communicate(timeout=100)
    assert not err and len(out.split()) == 4
    assert len(set(out.split())) == 1 and Path(out.split()[0]).read_bytes() == packed.read_bytes()
    pieces = [server.asked[f"toy.beton.{i:05d}"] for i in range(-(-packed.stat().st_size // SIZE))]
    assert set(pieces) == {1} and server.asked["toy.beton.json"] == 1
    assert names(tmp_path / "cache") == [".list.json", "toy.beton", "toy.beton.json"]


def test_a_damaged_piece_is_named(shared, tmp_path):
    folder, digest = copy_of(shared, tmp_path / "origin"), shared[1]
    piece = folder / "toy.beton.00002"
    content = piece.read_bytes()
    for damaged, what in (
        (content[:9] + bytes([content[9] ^ 4]) + content[10:], "its SHA-256 is not the list's"),
        (content[:-1], rf"{len(content) - 1} bytes of {len(content)}"),
    ):
        piece.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"the piece .*toy\.beton\.00002 is damaged: {what}"):
            fetch_shards(str(folder / "toy.beton.shards.json"), sha256=digest, cache=tmp_path / "cache")
        assert not list((tmp_path / "cache").rglob("*.beton"))
    piece.write_bytes(content + b"1")
    with pytest.raises(
        ValueError, match=rf"toy\.beton\.00002 has {len(content) + 1} bytes, and {len(content)} are the"
    ):
        fetch_shards(str(folder / "toy.beton.shards.json"), sha256=digest, cache=tmp_path / "cache")
    piece.write_bytes(content)
    fetch_shards(str(folder / "toy.beton.shards.json"), sha256=digest, cache=tmp_path / "cache")


def test_nothing_of_a_list_is_believed(shared, tmp_path):
    folder = copy_of(shared, tmp_path / "origin")
    path = folder / "toy.beton.shards.json"
    good = json.loads(path.read_text())
    first, *rest = good["pieces"]

    def refused(message: str, **changes) -> None:
        place, digest = listed(folder, **(good | changes))
        with pytest.raises(ValueError, match=message):
            fetch_shards(place, sha256=digest, cache=tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    for name in ("../x", "a/b", "..", ".hidden", "", "a\0b", "a" * 300, 7, None, "a\\b", "toy.beton"):
        refused("is no list of shards as `fasttrain shard` makes it", pieces=[first | {"name": name}, *rest])
        if name != "toy.beton":
            refused("is no list of shards as `fasttrain shard` makes it", name=name)
    refused(r"its pieces have \d+ bytes, and the file", pieces=rest)
    refused(r"its pieces have \d+ bytes, and the file", bytes=10**30)
    refused("is no size in bytes", pieces=[first | {"bytes": -1}, *rest])
    refused("is no size in bytes", pieces=[first | {"bytes": True}, *rest])
    refused("is no SHA-256", pieces=[first | {"sha256": "0" * 63}, *rest])
    refused("is not what stands beside", about=good["about"] | {"name": "other.json"})
    refused("is not what stands beside", about=good["about"] | {"bytes": 1 << 40})
    refused("is no list of shards", pieces={})
    refused("its format is 2, not 1", format=2)
    for content in (b"", b"[]", b"\xff", b"[" * 100_000, path.read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no list of shards"):
            fetch_shards(str(path), sha256="", cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"has the SHA-256 [0-9a-f]{64}, not 0{64}: it is damaged, or another one's"):
        fetch_shards(str(path), sha256="0" * 64, cache=tmp_path / "cache")
    with path.open("r+b") as file:
        file.truncate(remote.MAX_LIST + 1)
    with pytest.raises(ValueError, match="67108865 bytes, and 67108864 are the most"):
        fetch_shards(str(path), sha256="", cache=tmp_path / "cache")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 255), st.booleans())
def test_a_list_with_a_wrong_byte_is_refused_or_still_one(shared, at, flip, cut):
    """Any change is refused where the SHA-256 is known; where it is not, names stay in their folder, and sizes sum up."""
    content = bytearray((shared[0] / "toy.beton.shards.json").read_bytes())
    content[at % len(content)] ^= flip
    try:
        shards = remote.read_list(bytes(content[: at % len(content)] if cut else content), "list")
    except ValueError:
        return
    pieces = [shards.whole, *shards.pieces, *([shards.about] if shards.about else [])]
    assert all(Path(piece.name).name == piece.name and piece.bytes > 0 for piece in pieces)
    assert sum(piece.bytes for piece in shards.pieces) == shards.whole.bytes


def test_a_disk_without_room(shared, packed, tmp_path, monkeypatch):
    """It is said before anything is fetched; and where the disk fills up meanwhile, what is there is gone on with."""
    folder, digest = shared
    place = str(folder / "toy.beton.shards.json")
    with monkeypatch.context() as patch:
        patch.setattr(remote.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
        with pytest.raises(
            ValueError, match=r"data\.cache: .* has room for 0\.00 GiB, and toy\.beton needs 0\.\d\d GiB"
        ):
            fetch_shards(place, sha256=digest, cache=tmp_path)
    written, full = os.pwrite, SIZE * 5 // 2

    def pwrite(handle: int, chunk: bytes, at: int) -> int:
        if at + len(chunk) > full:
            raise OSError(28, "No space left on device")
        return written(handle, chunk, at)

    with monkeypatch.context() as patch:
        patch.setattr(remote.os, "pwrite", pwrite)
        with pytest.raises(ValueError, match=r"data\.cache: cannot keep toy\.beton in .*: No space left on device"):
            fetch_shards(place, sha256=digest, cache=tmp_path, workers=1)
    assert "toy.beton" not in names(tmp_path)
    assert fetch_shards(place, sha256=digest, cache=tmp_path).read_bytes() == packed.read_bytes()


def test_a_server_cannot_send_us_elsewhere(tmp_path, serve):
    server = serve(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read http://127.*/away: HTTP status 302, .*not allowed"):
        urls.read_small(f"{server.url}/away", limit=1000)


def test_urls_that_are_not_read():
    for url, message in (
        ("gopher://a/b", "URLs begin with http, https, file,"),
        ("zip://a::http://b/c", "one is not put into another"),
        ("abfs://user:word@host/a", r"abfs://host/a: a package for abfs:// is missing here"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            urls.read_small(url, limit=10)
        assert "word" not in str(caught.value)


def test_shard_sends_only_what_is_not_there(packed, tmp_path, capsys):
    arguments = [str(packed), "--to", str(tmp_path / "to"), "--shard-size", "1", "--json"]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    (tmp_path / "to/toy.beton.00001").write_bytes(b"half")
    changed = tmp_path / "to/toy.beton.00000"
    changed.write_bytes(b"1" + changed.read_bytes()[1:])
    assert main(arguments) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == first | {"sent": 2} and first["sent"] == first["pieces"]
    assert hashlib.sha256(Path(first["list"]).read_bytes()).hexdigest() == first["sha256"]
    assert main(arguments[:-1]) == 0
    assert f"data.sha256: {first['sha256']}" in capsys.readouterr().out


def test_mistakes_of_shard(packed, tmp_path):
    damaged = Path(shutil.copytree(packed.parent, tmp_path / "damaged")) / packed.name
    with damaged.open("r+b") as file:
        file.seek(SIZE)
        file.write(b"damaged")
    for arguments, message in (
        ([], "shard needs FILE.beton and --to"),
        (["x", "--to", "y", "--shard-size", "0"], "--shard-size: 0 is below 1"),
        (["x", "--to", "y", "--shard-size", "a"], "shard: argument --shard-size"),
        (["x", "--to", "y", "--size", "1"], "what is '--size'"),
        ([str(tmp_path / "none.beton"), "--to", "y"], "cannot read .*none.beton"),
        ([str(packed), "--to", "https://host/a"], "--to: https://host/a cannot be written to; name a folder"),
        ([str(packed), "--to", "/dev/null/a"], "--to: cannot write /dev/null/a/toy.beton.00000: Not a directory"),
        ([str(damaged), "--to", str(tmp_path / "to")], "is damaged: its SHA-256 is"),
    ):
        with pytest.raises(ValueError, match=message):
            main(arguments)
