"""Checkpoints, how they are read and written, and Ctrl-C, which waits for them and for the end of a step."""

import io
import json
import signal
import threading
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from torch import Tensor, nn

from fasttrain import checkpoint, files, interrupts
from fasttrain.torch_files import HoldsCode, read_torch
from fasttrain.writer import CheckpointWriter


@pytest.fixture(autouse=True)
def pythons_own_handler():
    """Where tests run side by side it is another."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C arrives while a checkpoint is being written, in the middle of its tensors."""
    save = torch.save

    def interrupt(content, file):
        class Interrupting:
            def write(self, data):
                signal.raise_signal(signal.SIGINT)
                return file.write(data)

            def flush(self):
                file.flush()

        save(content, Interrupting())

    monkeypatch.setattr(torch, "save", interrupt)


def test_ctrl_c_while_a_checkpoint_is_written_waits_for_it(tmp_path, interrupted):
    content = {"tensor": torch.randn(1000), "name": "x"}
    with pytest.raises(KeyboardInterrupt) as raised:
        checkpoint.save(tmp_path / "last.pt", content)
    assert raised.value.__context__ is None
    read = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(read["tensor"], content["tensor"])
    with pytest.raises(KeyboardInterrupt):  # and works as before from then on
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_not_lost_where_writing_fails(tmp_path, monkeypatch):
    def full(content, file):
        signal.raise_signal(signal.SIGINT)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(KeyboardInterrupt) as raised:
        checkpoint.save(tmp_path / "last.pt", {})
    assert isinstance(raised.value.__context__, OSError)
    assert list(tmp_path.iterdir()) == []


def test_a_thread_can_save(tmp_path):
    thread = threading.Thread(target=checkpoint.save, args=(tmp_path / "last.pt", {"a": 1}))
    thread.start()
    thread.join()
    assert checkpoint.load(tmp_path / "last.pt")["a"] == 1


def test_ctrl_c_is_held_until_checked_and_a_second_one_is_not():
    with interrupts.held():
        interrupts.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.check()  # it is raised once
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noted by a block within: raised at the outer one's end
        with interrupts.held(firm=True):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    assert not interrupts.note()


def test_what_is_noted_within_is_not_lost_where_the_signal_is_blocked():
    """As in runs side by side, which are told to end by another signal."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with interrupts.held():
            with interrupts.held(firm=True):
                assert interrupts.note()
            with pytest.raises(KeyboardInterrupt):
                interrupts.check()
        with pytest.raises(KeyboardInterrupt), interrupts.held():
            interrupts.note()
        assert signal.SIGINT not in signal.sigpending()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def same(a, b) -> bool:
    """Bit for bit, with types, strides and the order of names."""
    if isinstance(a, Tensor):
        if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
            return False
        return a.detach().contiguous().flatten().view(torch.uint8).tolist() == (
            b.detach().contiguous().flatten().view(torch.uint8).tolist()
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        meta = getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
        return meta and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def everything() -> dict:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    return {
        "net": net.state_dict(),
        "parameter": nn.Parameter(torch.randn(2)),
        "view": torch.randn(10)[3:6],
        "gaps": torch.randn(4, 4)[:, ::2],
        "empty": torch.empty(0, 3),
        "types": [
            torch.randn(3).to(t) for t in (torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64)
        ],
        "one": torch.tensor(1.5),
        "plain": (
            1,
            -5,
            10**30,
            2.5,
            True,
            None,
            "é",
            b"\x00\xff",
            torch.Size([1, 2]),
            torch.float16,
            torch.device("cuda", 1),
        ),
        "sets": [{1, (2, 3), "x"}, set()],
        "counts": Counter({1: 2}),
        "ordered": OrderedDict(b=1, a=2),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saved_is_read_as_torch_reads_it(tmp_path, zipped):
    path = tmp_path / "a.pth"
    torch.save(everything(), path, _use_new_zipfile_serialization=zipped)
    want = torch.load(path, weights_only=True)
    assert same(read_torch(path, "the weights"), want)
    assert same(read_torch(path.read_bytes(), "the weights"), want)


def test_new_types_and_shared_tensors_are_read():
    out = io.BytesIO()
    one = torch.randn(4)
    torch.save(
        {"a": one, "b": one[1:], "c": torch.randn(4).to(torch.float8_e4m3fn), "d": torch.arange(3).to(torch.uint16)},
        out,
    )
    found, want = read_torch(out.getvalue(), "the weights"), torch.load(io.BytesIO(out.getvalue()), weights_only=True)
    assert same(found, want)
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


def test_code_is_named_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("run",))

    for zipped in (True, False):
        torch.save({"a": Trap()}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(HoldsCode, match=r"the weights a\.pth: it holds code \(print\)") as raised:
            read_torch(tmp_path / "a.pth", "the weights a.pth")
        assert raised.value.name == "print"
    with pytest.raises(ValueError, match="holds code and was not loaded"):
        checkpoint.load(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as program:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            program.writestr(f"a/{name}", "")
    with pytest.raises(HoldsCode, match="TorchScript"):
        read_torch(tmp_path / "a.pt", "the weights")


def test_a_checkpoint_comes_back_as_it_was_and_torch_reads_it(tmp_path):
    content = everything()
    checkpoint.save(tmp_path / "last.pt", content)
    found = checkpoint.load(tmp_path / "last.pt")
    assert found.pop("format") == checkpoint.FORMAT
    assert same(found, content)
    assert torch.equal(torch.load(tmp_path / "last.pt", weights_only=True)["one"], content["one"])


def test_the_checksum_sees_every_kind_of_change():
    changes = {
        "value": lambda c: c["one"].add_(1),
        "type": lambda c: c.update(one=c["one"].double()),
        "shape": lambda c: c.update(view=c["view"][None]),
        "layout": lambda c: c["net"].update({"0.weight": c["net"]["0.weight"].contiguous()}),
        "name": lambda c: c.update(two=c.pop("one")),
        "plain": lambda c: c.update(plain=(True, *c["plain"][1:])),
        "set": lambda c: c["sets"][0].remove(1),
        "version": lambda c: c["net"]._metadata["1"].update(version=1),
    }
    found = {checkpoint.digest(everything())}
    for change in changes.values():
        content = everything()
        change(content)
        found.add(checkpoint.digest(content))
    assert len(found) == 1 + len(changes)
    assert checkpoint.digest(everything()) in found


def test_checkpoints_of_format_1_are_read(tmp_path):
    torch.save({"a": torch.ones(2), "format": 1}, tmp_path / "old.pt")
    assert checkpoint.load(tmp_path / "old.pt")["a"].tolist() == [1, 1]
    torch.save({"a": torch.ones(2), "format": 2}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(tmp_path / "bare.pt")


def test_a_damaged_summary_is_named(tmp_path):
    path = tmp_path / "summary.json"
    for text in ('{"a": ', "[1]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"summary\.json is damaged"):
            checkpoint.read_summary(path)
    path.write_text(json.dumps({"a": 1}))
    assert checkpoint.read_summary(path) == {"a": 1}


def test_room_is_insisted_on_before_it_is_needed(tmp_path):
    files.insist_on_room(tmp_path / "not" / "there", 1, "a checkpoint")
    with pytest.raises(ValueError, match=r"^run\.dir: .* free in .*there, and a checkpoint takes 1073741824\.0 GiB$"):
        files.insist_on_room(tmp_path / "not" / "there", 1 << 60, "a checkpoint")
    content = {"a": torch.zeros(100_000), "b": [torch.zeros(50_000), {"c": "x" * 1000}]}
    checkpoint.save(tmp_path / "a.pt", content)
    assert files.size_of(content) == pytest.approx((tmp_path / "a.pt").stat().st_size, rel=0.05)


@pytest.fixture
def writer(tmp_path):
    made = []

    def make(**how):
        said: list[str] = []
        made.append(CheckpointWriter(tmp_path, report=said.append, **how))
        return made[-1], said

    yield make
    for one in made:
        one.close()


def at(step: int, **more) -> dict:
    return {"target": torch.full((1000,), float(step)), "position": {"step": step}} | more


def test_what_is_written_is_the_state_as_it_was(tmp_path, writer):
    writes, said = writer(keep=1)
    content, before = everything() | at(1), everything() | at(1)
    writes.save("last.pt", content)
    content["one"].add_(1)
    content["net"]["0.weight"].zero_()
    content["position"]["step"] = 2
    content["sets"][0].clear()
    writes.wait()
    found = checkpoint.load(tmp_path / "last.pt")
    found.pop("format")
    assert same(found.pop("gaps"), before.pop("gaps").contiguous())
    assert same(found, before)
    assert said == []


def test_tensors_that_share_memory_are_written_once(tmp_path, writer):
    writes, _ = writer(keep=1)
    big = torch.randn(100_000)
    writes.save("last.pt", at(1, a=big, b=big.detach()))
    writes.wait()
    assert (tmp_path / "last.pt").stat().st_size < 500_000


def test_memory_of_a_snapshot_is_used_again(writer):
    writes, _ = writer(keep=1)
    places = set()
    for step in range(4):
        writes.save("last.pt", at(step))
        writes.wait()
        places.add(tuple(t.data_ptr() for found in writes._buffers.free.values() for t in found))
    assert len(places) == 1


def test_the_newest_are_kept_by_step(tmp_path, writer):
    writes, said = writer(keep=3)
    for step in (5, 10, 15, 15, 20):
        writes.save("last.pt", at(step))
        writes.wait()
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [15, 10]
    assert [checkpoint.load(path)["position"]["step"] for _, path in checkpoint.steps(tmp_path)] == [15, 10]
    writes.close()
    writes, _ = writer(keep=2)  # as another process, which reads which step last.pt is of
    writes.save("last.pt", at(25))
    writes.wait()
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [20]
    writes.close()
    writes, _ = writer(keep=1)
    writes.save("last.pt", at(30))
    writes.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt"]
    assert said == []


def test_a_damaged_last_checkpoint_is_moved_aside_when_the_next_is_written(tmp_path, writer):
    (tmp_path / "last.pt").write_bytes(b"junk")
    writes, said = writer(keep=2)
    writes.save("last.pt", at(3))
    writes.wait()
    assert (tmp_path / "last.pt.damaged").read_bytes() == b"junk"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["last.pt", "last.pt.damaged"]
    assert ["is damaged, and was moved" in line for line in said] == [True]


def test_where_the_thread_fails_the_next_call_says_so(writer):
    writes, said = writer(keep=1)
    writes.save("last.pt", {"target": torch.zeros(1)})  # no step
    with pytest.raises(RuntimeError, match="'position'"):
        writes.wait()
    with pytest.raises(RuntimeError, match="not written any more"):
        writes.save("last.pt", at(1))
    assert len(said) == 1
