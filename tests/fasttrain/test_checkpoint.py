"""Checkpoints, and Ctrl-C, which waits for them and for the end of a step."""

import signal
import threading

import pytest
import torch

from fasttrain import checkpoint, interrupts


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
