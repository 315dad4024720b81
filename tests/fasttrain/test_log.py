"""A run's log on a disk that fills up (here: a limit on the size of files, which the kernel enforces in the middle of a line)."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from fasttrain.log import RunLog, read_lines


def _line(step: int) -> dict:
    return {"kind": "step", "step": step, "loss": step / 3}


def _bytes(*steps: int) -> bytes:
    return b"".join((json.dumps(_line(step)) + "\n").encode() for step in steps)


@contextmanager
def _room(size: int) -> Iterator[None]:
    """No file may be larger than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _notes(told: list[dict]) -> list[str]:
    return [line["text"] for line in told if line["kind"] == "note"]


def test_lines_wait_until_there_is_room_and_keep_their_order(tmp_path):
    told, path = [], tmp_path / "metrics.jsonl"
    log = RunLog(tmp_path, told.append, tensorboard=False)
    log.write(_line(1))
    with _room(len(_bytes(1, 2)) + 10):
        for step in (2, 3, 4):
            log.write(_line(step))
            assert path.read_bytes() == _bytes(1, 2)  # no part of a line
        assert log.position() == len(_bytes(1, 2))
    log.write(_line(5))
    assert path.read_bytes() == _bytes(1, 2, 3, 4, 5) and log.position() == len(_bytes(1, 2, 3, 4, 5))
    log.write(_line(6))
    log.close()
    assert [line["step"] for line in told if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert _notes(told) == [
        f"{path} cannot be written (File too large): its lines wait in memory until there is room; training goes on",
        f"{path} is written again, with 2 lines that waited",
    ]


def test_a_position_asks_for_room_once_more(tmp_path):
    log = RunLog(tmp_path, lambda line: None, tensorboard=False)
    with _room(10):
        log.write(_line(1))
        assert log.position() == 0
    assert log.position() == len(_bytes(1)) and (tmp_path / "metrics.jsonl").read_bytes() == _bytes(1)
    log.close()


def test_lines_without_room_at_the_end_are_counted(tmp_path):
    told = []
    with _room(10):
        log = RunLog(tmp_path, told.append, tensorboard=False)
        log.write(_line(1))
        log.write(_line(2))
        log.close()
    assert _notes(told)[1:] == [f"{tmp_path / 'metrics.jsonl'}: its last 2 lines were never written"]
    assert read_lines(tmp_path, "step") == []


@pytest.mark.parametrize("known", ["nothing waits", "lines wait"])
def test_going_on_from_a_checkpoint_doubles_no_line(known, tmp_path):
    log = RunLog(tmp_path, lambda line: None, tensorboard=False)
    log.write(_line(1))
    with _room(len(_bytes(1)) + (1000 if known == "nothing waits" else 3)):
        log.write(_line(2))
        kept = log.position()
    log.write(_line(3))
    log.close()
    RunLog(tmp_path, lambda line: None, tensorboard=False, keep=kept).close()
    again = RunLog(tmp_path, lambda line: None, tensorboard=False, keep=kept)
    again.write(_line(3))
    again.close()
    assert [line["step"] for line in read_lines(tmp_path, "step")] == (
        [1, 2, 3] if known == "nothing waits" else [1, 3]
    )


def test_a_log_that_lost_lines_is_gone_on_with_and_has_no_hole(tmp_path):
    told, path = [], tmp_path / "metrics.jsonl"
    path.write_bytes(_bytes(1, 2) + b'{"kind": "st')
    log = RunLog(tmp_path, told.append, tensorboard=False, keep=500)
    log.write(_line(9))
    log.close()
    assert path.read_bytes() == _bytes(1, 2, 9)
    assert _notes(told) == [
        f"{path} is shorter than the checkpoint says: the lines of its last {500 - len(_bytes(1, 2))} bytes are lost"
    ]


def test_without_a_folder_nothing_is_written_and_nobody_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []
    log = RunLog(None, told.append, tensorboard=True, keep=50)
    log.write(_line(1))
    assert log.position() == 0
    log.close()
    assert told == [] and list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_that_fails_is_given_up(tmp_path, monkeypatch):
    told = []
    log = RunLog(tmp_path, told.append, tensorboard=True)
    log.write(_line(1))
    log._board.flush()

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(2, 40):
        log.write(_line(step))
    log.close()
    assert _notes(told) == [
        "TensorBoard's events cannot be written any more (No space left on device); training goes on"
    ]
    assert [line["step"] for line in read_lines(tmp_path, "step")] == list(range(1, 40))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(1, pytest.approx(1 / 3))]


def test_tensorboard_that_cannot_begin_is_given_up(tmp_path):
    told = []
    (tmp_path / "tensorboard").write_text("no folder")
    log = RunLog(tmp_path, told.append, tensorboard=True)
    log.write(_line(1))
    log.close()
    assert len(_notes(told)) == 1 and _notes(told)[0].startswith("TensorBoard's events cannot be written any more (")
