"""Checkpoints that are damaged, crafted, killed while being written, or for which there is no room."""

import errno
import io
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from fasttrain import checkpoint, files
from fasttrain.torch_files import HoldsCode, read_torch
from fasttrain.writer import CheckpointWriter

MAGIC = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})


@pytest.fixture(scope="module")
def state():
    """A small network's, with all kinds of values that a run's checkpoint has."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(576, 10))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    optimiser.step()
    return {
        "target": net.state_dict(),
        "average": None,
        "classes": ["cat", "Füchse"],
        "optimisers": [optimiser.state_dict()],
        "bad_samples": {3, 17},
        "position": {"epoch": 1, "step": 7, "finished": False},
        "sums": {"loss": torch.tensor(0.25)},
        "speeds": [1234.5, float("inf")],
        "recipe": {"optim": {"milestones": (0.5, 0.75)}},
    }


@pytest.fixture
def writer(tmp_path):
    made = []

    def make(folder=tmp_path, keep=1):
        said: list[str] = []
        made.append(CheckpointWriter(folder, keep=keep, report=said.append))
        return made[-1], said

    yield make
    for one in made:
        one.close()


def test_a_damaged_checkpoint_is_refused_or_the_same_and_the_one_before_it_is_found(tmp_path, state):
    last, before = tmp_path / "last.pt", tmp_path / "step-000000003.pt"
    checkpoint.save(before, state | {"position": {"step": 3}})
    checkpoint.save(last, state)
    whole, want = last.read_bytes(), checkpoint.digest(checkpoint.load(last))
    draw, refused = random.Random(0), {"flip": 0, "cut": 0, "zero": 0}
    for number in range(300):
        kind, bad = ("flip", "cut", "zero")[number % 3], bytearray(whole)
        at = draw.randrange(len(bad))
        if kind == "flip":
            bad[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del bad[at:]
        else:
            bad[at : at + 512] = bytes(len(bad[at : at + 512]))
        last.write_bytes(bad)
        said: list[str] = []
        path, found = checkpoint.newest(tmp_path, said.append)
        if path == last:
            assert checkpoint.digest(found) == want
            assert said == []
        else:
            assert (path, found["position"]["step"], len(said)) == (before, 3, 2)
            assert str(last) in said[0]
            refused[kind] += 1
    assert refused["cut"] == 100
    assert min(refused.values()) >= 80  # the rest hit what lies between the parts of a zip file


def test_a_bit_that_changes_with_its_crc_is_found(tmp_path, state):
    """As where memory was damaged before the file was written, or a tool wrote it anew."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, state)
    content = torch.load(path, weights_only=True)
    content["target"]["0.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"last\.pt is damaged"):
        checkpoint.load(path)


def test_all_damaged_says_what_to_do(tmp_path, state):
    assert checkpoint.newest(tmp_path, print) is None
    for name in ("last.pt", "step-000000001.pt"):
        (tmp_path / name).write_bytes(b"junk")
    said: list[str] = []
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read .*restore one from a copy, or remove"):
        checkpoint.newest(tmp_path, said.append)
    assert len(said) == 2


def saved(content, **how) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **how)
    return out.getvalue()


def rezipped(data: bytes, change=lambda name, part: part, **how) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", **how) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def test_what_asks_for_more_than_its_bytes_is_refused():
    bomb = rezipped(saved(torch.zeros(10**6)), compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 50_000
    with pytest.raises(ValueError, match="compressed"):
        read_torch(bomb, "the weights")
    with pytest.raises(ValueError, match=r"shape \[1000000, 1000000\] needs more"):
        read_torch(saved({"a": torch.zeros(1).expand(10**6, 10**6)}), "the weights")
    many = [torch.zeros(1000)] * 1000  # the same one: no more memory than one
    assert len(read_torch(saved(many[:3]), "the weights")) == 3
    one = torch.zeros(10**6)
    with pytest.raises(ValueError, match="many times larger"):
        read_torch(saved([one[i:] for i in range(1000)]), "the weights")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_storage_that_says_it_is_larger_is_refused(zipped):
    data = saved(torch.zeros(1000), _use_new_zipfile_serialization=zipped)
    wrong = lambda part: part.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f")  # noqa: E731
    data = rezipped(data, lambda _, part: wrong(part)) if zipped else wrong(data)
    with pytest.raises(ValueError, match=r"storage .* of another size"):
        read_torch(data, "the weights")
    if not zipped:
        data = data.replace(struct.pack("<q", 1000), struct.pack("<q", 2**31 - 1))
        with pytest.raises(ValueError, match="ends too early"):
            read_torch(data, "the weights")


def legacy(code: bytes) -> bytes:
    """A file of the format before zip, whose content is what ``code`` makes."""
    return b"".join(pickle.dumps(part, protocol=2) for part in MAGIC) + b"\x80\x02" + code + pickle.dumps([], 2)


CRAFTED = {
    "a call": (b"cposix\nsystem\nX\x04\0\0\0true\x85R.", r"code \(posix\.system\)"),
    "a bytearray": (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", r"code \(bytearray\)"),
    "a tensor by size": (b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.", r"code \(torch\.FloatTensor\)"),
    "a string without end": (b"X\xff\xff\xff\xffabc.", "ends too early"),
    "bytes again and again": (
        b"c_codecs\nencode\nq\1X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\2X\6\0\0\0latin1q\3"
        b"(" + b"h\1h\2h\3\x86R" * 100_000 + b"t.",
        "too much memory",
    ),
    "a list in itself": (b"]q\0h\0a.", "holds itself"),
    "a deep list": (b"]" * 100_000 + b"a" * 99_999 + b".", ""),
    "too little": (b"aaa.", ""),
    "an attribute": (b"ccollections\nOrderedDict\n)R}X\1\0\0\0aNsb.", "attributes"),
    "ours": (b"ctorch._utils\n_rebuild_tensor_v2\n}X\3\0\0\0runNsb.", "attributes"),
    "a tensor as a name": (b"}ctorch\nfloat32\nNs.", "no plain value"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_pickles_are_refused_at_once(name):
    code, message = CRAFTED[name]
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=f"(cannot read )?the weights.*{message}") as raised:
        read_torch(legacy(code), "the weights")
    assert time.perf_counter() - begin < 5
    assert isinstance(raised.value, HoldsCode) == ("code" in message)


def test_values_without_end_are_refused(monkeypatch):
    monkeypatch.setattr("fasttrain.torch_files._READS", 10_000)
    assert len(read_torch(saved(list(range(1000))), "the weights")) == 1000
    with pytest.raises(ValueError, match="more plain values"):
        read_torch(saved([[] for _ in range(10_000)]), "the weights")


def test_values_that_share_one_another_do_not_grow_without_end():
    """Forty lists, each of the one before it twice: a checkpoint's checksum would never be done."""
    nested: list = []
    for _ in range(40):
        nested = [nested, nested]
    with pytest.raises(ValueError, match="many times larger than the file"):
        read_torch(saved(nested), "the checkpoint")


def test_reading_takes_less_memory_than_twice_the_file(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from fasttrain import checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = peak(); checkpoint.load(Path(sys.argv[1])); print(peak() - before)"
    )
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"a": torch.zeros(10_000_000), "b": torch.ones(10_000_000)})
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(out.stdout) < 1.3 * path.stat().st_size


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A folder on a disk of 2 MiB: a real one where this process may mount it, else one that is counted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    how = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    mounted = shutil.which("mount") and not subprocess.run(how, capture_output=True, check=False).returncode
    if not mounted:
        monkeypatch.setattr(files, "open", lambda *given: _Counted(folder, *given), raising=False)
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


class _Counted(io.FileIO):
    def __init__(self, folder: Path, *given) -> None:
        super().__init__(*given)
        self.folder = folder

    def write(self, data) -> int:
        if sum(p.stat().st_size for p in self.folder.iterdir()) + memoryview(data).nbytes > 2 << 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def made(step: int, kib: int) -> dict:
    return {"target": {"w": torch.full((kib * 256,), float(step))}, "position": {"step": step}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "ballast")


def test_a_full_disk_leaves_the_checkpoint_before_and_is_tried_again(small_disk, writer):
    writes, said = writer(small_disk)
    writes.save("last.pt", made(1, 500))
    writes.wait()
    (small_disk / "ballast").write_bytes(bytes(1200 << 10))
    writes.save("last.pt", made(2, 500))
    with pytest.raises(OSError, match="No space left"):
        writes.wait()
    assert checkpoint.load(small_disk / "last.pt")["position"]["step"] == 1
    assert names(small_disk) == ["last.pt"]
    assert f"cannot write {small_disk}/last.pt (No space left on device; " in said[0]
    writes.save("last.pt", made(3, 500))  # the training goes on
    with pytest.raises(OSError, match="No space left"):
        writes.wait()
    (small_disk / "ballast").unlink()
    writes.wait()
    assert checkpoint.load(small_disk / "last.pt")["position"]["step"] == 3
    assert names(small_disk) == ["last.pt"]


def test_what_could_not_be_written_is_tried_again_unasked(small_disk, writer, monkeypatch):
    monkeypatch.setattr("fasttrain.writer._RETRY_S", 0.05)
    writes, said = writer(small_disk)
    (small_disk / "ballast").write_bytes(bytes(1800 << 10))
    writes.save("last.pt", made(1, 500))
    until(lambda: len(said) > 1)
    (small_disk / "ballast").unlink()
    until((small_disk / "last.pt").is_file)


def until(happened) -> None:
    end = time.perf_counter() + 20
    while not happened():
        assert time.perf_counter() < end
        time.sleep(0.01)


def test_where_the_disk_is_full_the_oldest_gives_way_and_never_the_last_one(small_disk, writer):
    writes, said = writer(small_disk, keep=5)
    for step in range(1, 7):
        writes.save("last.pt", made(step, 550))
        writes.wait()
    assert names(small_disk) == ["last.pt", "step-000000004.pt", "step-000000005.pt"]
    assert "step-000000001.pt is removed" in said[0]
    writes.save("last.pt", made(7, 1600))  # never fits beside another one
    with pytest.raises(OSError, match="No space left"):
        writes.wait()
    assert names(small_disk) == ["last.pt"]
    assert checkpoint.load(small_disk / "last.pt")["position"]["step"] == 6


def test_last_is_not_written_while_the_selected_one_it_tells_of_is_missing(small_disk, writer):
    writes, said = writer(small_disk)
    (small_disk / "ballast").write_bytes(bytes(1 << 20))
    writes.save("selected.pt", made(1, 1500))
    writes.save("last.pt", made(1, 10))
    writes.save("selected.pt", made(2, 1500))
    writes.save("last.pt", made(2, 10))
    with pytest.raises(OSError, match="No space left"):
        writes.wait()
    assert names(small_disk) == []
    (small_disk / "ballast").unlink()
    writes.wait()
    assert names(small_disk) == ["last.pt", "selected.pt"]
    for name in ("last.pt", "selected.pt"):
        assert checkpoint.load(small_disk / name)["position"]["step"] == 2
    assert all("selected.pt" in line for line in said)


def test_closing_on_a_full_disk_ends(small_disk, writer):
    writes, said = writer(small_disk)
    writes.save("last.pt", made(1, 3000))
    writes.close()
    assert names(small_disk) == []
    assert said
    with pytest.raises(OSError, match="No space left"):
        writes.wait()


def test_a_slow_disk_is_waited_for_by_nobody_but_wait(tmp_path, writer, monkeypatch):
    write, order = checkpoint.write, []

    def slow(path, content, **how):
        time.sleep(0.2)
        order.append((path.name, content["position"]["step"]))
        write(path, content, **how)

    monkeypatch.setattr(checkpoint, "write", slow)
    writes, _ = writer()
    begin = time.perf_counter()
    for step in range(1, 6):
        writes.save("selected.pt", made(step, 1))
        writes.save("last.pt", made(step, 1))
        time.sleep(0.01)
    assert time.perf_counter() - begin < 0.2
    writes.wait()
    assert time.perf_counter() - begin > 0.4
    assert len(order) <= 3  # what waited gave way to what came later
    assert order[-2:] == [("selected.pt", 5), ("last.pt", 5)]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from fasttrain import checkpoint
from fasttrain.files import remove_unfinished
from fasttrain.writer import CheckpointWriter

torch.set_num_threads(1)
folder, draw = Path(sys.argv[1]), random.Random(0)

def work(pipe, step):
    writes = CheckpointWriter(folder, keep=3, report=lambda text: os.write(2, text.encode()))
    while True:
        step += 1
        state = {"target": {"w": torch.full((50_000,), float(step))}, "position": {"step": step}}
        writes.save("selected.pt", state)
        writes.save("last.pt", state)
        if draw.random() < 0.3:
            writes.wait()
            os.write(pipe, b"%d " % step)

step = 0
for round in range(10):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        work(write, step)
    os.close(write)
    time.sleep(draw.uniform(0.03, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(read) as pipe:
        promised = max(map(int, pipe.read().split()), default=step)
    assert len(list(folder.glob(".*.tmp"))) <= 1
    remove_unfinished(folder)
    assert {p.name for p in folder.iterdir()} - {"last.pt", "selected.pt"} == {p.name for _, p in checkpoint.steps(folder)}
    assert len(checkpoint.steps(folder)) <= 3
    path, state = checkpoint.newest(folder, lambda text: sys.exit(text))
    assert state["position"]["step"] >= promised, (promised, state["position"])
    assert checkpoint.load(folder / "selected.pt")["position"]["step"] >= state["position"]["step"]
    step = state["position"]["step"]
print(step)
"""


def test_a_process_killed_at_any_moment_leaves_a_good_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("selected.pt", "last.pt"):
        checkpoint.save(folder / name, made(0, 1))
    out = subprocess.run(
        [sys.executable, "-c", KILLED, folder],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ,
    )
    assert (out.returncode, out.stderr) == (0, "")
    assert int(out.stdout) > 10
