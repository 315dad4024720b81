"""Writes checkpoints in the background: the training waits for a copy of its state in memory, and not for the disk.

At most three such copies are there: one that is being written, and the newest selected.pt and last.pt that wait. Their
memory is used again by the copies that follow.
"""

import copy
import errno
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .checkpoint import LAST
from .files import in_words

_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]

_RETRY_S = 60.0  # after a failure, where nobody asks for anything


@dataclass
class _Snapshot:
    """A state as it was: tensors in memory of ours, complete when ``copied`` is."""

    name: str
    state: dict[str, Any]
    buffers: list[tuple["_Layout", Tensor]]
    copied: torch.cuda.Event | None


@dataclass
class _Buffers:
    """Memory for tensors of one layout each, that can be used again. From a GPU they are copied into pinned memory."""

    free: dict[_Layout, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def take(self, like: Tensor) -> Tensor:
        kept = self.free[_layout(like)]
        return kept.pop() if kept else torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)

    def give_back(self, snapshot: _Snapshot) -> None:
        for layout, tensor in snapshot.buffers:
            self.free[layout].append(tensor)


class CheckpointWriter:
    """Writes a run's checkpoints in the order in which they were asked for.

    A checkpoint that could not be written waits, is tried again before any other, and gives way to a newer one of its
    name; so does one that still waits when a newer one comes. last.pt tells of a selected.pt, and is never written
    while an older one of that is missing.

    Args:
        folder: the run's ``checkpoints``.
        keep: how many to keep: last.pt, and of those before it the newest, as step-000001234.pt.
        report: takes warnings, in this class's thread.
    """

    def __init__(self, folder: Path, *, keep: int, report: Callable[[str], None]) -> None:
        assert keep >= 1
        self._folder, self._keep, self._report = folder, keep, report
        self._changed = threading.Condition()  # guards what follows
        self._waiting: list[_Snapshot] = []
        self._writing: _Snapshot | None = None
        self._error: OSError | None = None  # of the last attempt, if that failed
        self._again = False  # somebody asked since then
        self._closed = self._ended = False
        self._broken: Exception | None = None  # what ended the thread
        self._buffers = _Buffers()
        self._present: int | None = None  # last.pt's step, if it is known to be whole
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Copies a state, and returns: it is written later, and may change meanwhile.

        Tensors on a GPU are copied in the current stream, into pinned memory: the GPU does so before whatever it is
        given next, and nobody waits for it here.

        Args:
            name: of the file. That of last.pt has its step as ``state["position"]["step"]``.
            state: tensors and plain values.

        Raises:
            RuntimeError: the thread that writes has ended on an error.
        """
        with self._changed:
            self._insist_alive()
            assert not self._closed
            snapshot = self._snapshot(name, state)
            at = [i for i, other in enumerate(self._waiting) if other.name == name]
            for i in reversed(at):
                self._buffers.give_back(self._waiting.pop(i))
            place = at[0] if at and name != LAST else len(self._waiting)
            self._waiting.insert(place, snapshot)
            self._ask()

    def wait(self) -> None:
        """Returns when all that was asked for is on the disk.

        Raises:
            OSError: something could not be written, in an attempt made since this was called; its text is a sentence.
            RuntimeError: the thread that writes has ended on an error.
        """
        with self._changed:
            self._ask()
            self._changed.wait_for(lambda: self._ended or (self._writing is None and self._settled()))
            self._insist_alive()
            if self._waiting and self._error is not None:
                raise self._not_written(self._waiting[0].name, self._error)

    def close(self) -> None:
        """Tries once more to write what waits, and ends the thread; what could not be written has been reported."""
        with self._changed:
            self._closed = True
            self._ask()
        self._thread.join()
        self._buffers = _Buffers()

    def _ask(self) -> None:
        self._again = True
        self._changed.notify_all()

    def _settled(self) -> bool:
        return not self._waiting or (self._error is not None and not self._again)

    def _insist_alive(self) -> None:
        if self._broken is not None:
            raise RuntimeError(f"checkpoints are not written any more: {self._broken}") from self._broken

    def _snapshot(self, name: str, state: dict[str, Any]) -> _Snapshot:
        known: dict[tuple[int, _Layout], Tensor] = {}  # tensors that share memory go on doing so
        copied = _copied(state, known, self._buffers)
        device = next((layout[3] for _, layout in known if layout[3].type == "cuda"), None)
        event = torch.cuda.current_stream(device).record_event() if device is not None else None
        return _Snapshot(name, copied, [(layout, tensor) for (_, layout), tensor in known.items()], event)

    def _work(self) -> None:
        try:
            while self._attempt():
                pass
        except Exception as error:
            self._broken = error
            self._report(f"WARNING: checkpoints are not written any more: {type(error).__name__}: {error}")
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _attempt(self) -> bool:
        """Waits for something to write, and writes it; False when there is nothing more to come."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._waiting and (self._error is None or self._again)),
                timeout=_RETRY_S if self._waiting else None,
            )
            if not self._waiting or (self._closed and self._error is not None and not self._again):
                return not self._closed
            self._writing, self._again = self._waiting.pop(0), False
            snapshot = self._writing
        error = self._write(snapshot)
        with self._changed:
            self._error, self._writing = error, None
            newer = next((other for other in self._waiting if other.name == snapshot.name), None)
            if error is None or newer is not None:
                self._buffers.give_back(snapshot)
            if error is not None and newer is None:
                self._waiting.insert(0, snapshot)
            elif error is not None and newer is not None and snapshot.name != LAST:
                self._waiting.remove(newer)
                self._waiting.insert(0, newer)
            self._changed.notify_all()
        return True

    def _write(self, snapshot: _Snapshot) -> OSError | None:
        if snapshot.copied is not None:
            snapshot.copied.synchronize()
        path = self._folder / snapshot.name
        while True:
            try:
                if snapshot.name == LAST:
                    self._write_last(path, snapshot.state)
                else:
                    checkpoint.write(path, snapshot.state)
                return None
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT) and self._make_room():
                    continue
                self._report(
                    f"WARNING: cannot write {path} ({self._why(error)}): the training goes on, and it is tried again"
                )
                return error

    def _write_last(self, path: Path, state: dict[str, Any]) -> None:
        """last.pt, with the one before it put aside when the new one is whole. Killed in between, the newest is there."""
        step = _step_of(state)

        def put_aside() -> None:
            if path.is_file() and not self._know_present():
                path.replace(path.with_name(f"{LAST}.damaged"))
                self._report(f"WARNING: {path} is damaged, and was moved to {LAST}.damaged")
            elif path.is_file() and self._keep > 1 and self._present != step:
                path.replace(self._folder / f"step-{self._present:09d}.pt")
            for old in [p for its, p in checkpoint.steps(self._folder) if its < step][self._keep - 1 :]:
                self._remove(old)

        checkpoint.write(path, state, ready=put_aside)
        self._present = step

    def _not_written(self, name: str, error: OSError) -> OSError:
        text = f"run.dir: cannot write {self._folder / name} ({self._why(error)}); "
        if self._present is not None:
            text += f"the last checkpoint is of step {self._present}: "
        out = OSError(f"{text}make room, and the same command goes on")
        out.errno = error.errno
        return out

    def _know_present(self) -> bool:
        """Whether last.pt is whole; one that another process wrote is read once."""
        if self._present is None:
            try:
                self._present = _step_of(checkpoint.load(self._folder / LAST))
            except ValueError:
                return False
        return True

    def _make_room(self) -> bool:
        """Removes the oldest checkpoint of those before last.pt, if that is there and whole."""
        kept = checkpoint.steps(self._folder)
        if not kept or not (self._folder / LAST).is_file() or not self._know_present():
            return False
        self._report(
            f"WARNING: {self._folder} is full ({self._free()} free): {kept[-1][1].name} is removed for a newer one"
        )
        return self._remove(kept[-1][1])

    def _remove(self, path: Path) -> bool:
        try:
            path.unlink()
        except OSError as error:
            self._report(f"WARNING: cannot remove {path} ({error.strerror or error})")
            return False
        return True

    def _why(self, error: OSError) -> str:
        return f"{error.strerror or error}; {self._free()} free in {self._folder}"

    def _free(self) -> str:
        try:
            return in_words(shutil.disk_usage(self._folder).free)
        except OSError:
            return "nobody knows what is"


def _copied(value: Any, known: dict[tuple[int, _Layout], Tensor], buffers: _Buffers) -> Any:
    """A copy of a state that shares no memory with it."""
    if value is None or isinstance(value, (int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensor = value.detach()
        key = (tensor.data_ptr() or id(value), _layout(tensor))
        if key not in known:
            known[key] = buffers.take(tensor)
            known[key].copy_(tensor, non_blocking=True)
        return known[key]
    if isinstance(value, dict):
        out = copy.copy(value)
        for name, item in value.items():
            out[name] = _copied(item, known, buffers)
        if hasattr(value, "_metadata"):  # a state dict's
            out.__dict__["_metadata"] = copy.deepcopy(value._metadata)
        return out
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)([_copied(item, known, buffers) for item in value])
    return copy.deepcopy(value)


def _layout(tensor: Tensor) -> _Layout:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _step_of(state: dict[str, Any]) -> int:
    return int(state["position"]["step"])
