"""A whole training step as one CUDA graph: forward, backward, clipping, optimiser and moving average are one launch.

A graph replays what the device was given when it was recorded: the same kernels on the same memory. So all that changes from
step to step (pixels, labels, soft labels, learning rates) is first copied into tensors that stay, nothing of Python runs in a
replay, and what the step returns is the same memory every time.

Shape suffixes: B batch, C all sources' classes side by side, K what is kept of a label.
"""

import gc
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .kernels import TopK
from .sources import SoftTargets

Outputs = tuple[dict[str, Tensor], Tensor]
Work = Callable[[Tensor, Tensor, SoftTargets | None], Outputs]
T = TypeVar("T")
WARM_UP = 2  # steps in the recorder's stream before one is recorded: what is made or chosen once is then made


class Recorder(Protocol):
    """Records device work once and repeats it."""

    def warm(self, work: Callable[[], T]) -> T:
        """Does the work now, where it will be recorded."""
        ...

    def record(self, work: Callable[[], T]) -> T:
        """Records the work; it is not done yet. What it returns holds numbers after :meth:`replay`."""
        ...

    def replay(self) -> None:
        """Does what was recorded, after what the current stream was given so far."""
        ...

    def close(self) -> None:
        """Lets go of the record and its memory."""
        ...


class CudaRecorder:
    """Records a CUDA graph, in a stream of its own.

    Warming up in that stream leaves nothing that belongs to another one, which a capture would have to wait for; and
    cuBLAS keeps its workspace by stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def warm(self, work: Callable[[], T]) -> T:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = work()
        current.wait_stream(self._stream)
        return out

    def record(self, work: Callable[[], T]) -> T:
        """As it says above.

        Raises:
            ValueError: the work makes the host wait, or does something else that no graph can hold.
        """
        gc.collect()  # autograd nodes that are garbage still belong to the stream of the first step
        self._graph = torch.cuda.CUDAGraph()
        try:
            # loaders' and writers' threads may work meanwhile
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                return work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = " ".join(str(error).split())[:200]
            raise ValueError(
                f"run.compile: step cannot be recorded as a CUDA graph ({why}); set it to true, or to graphs"
            ) from error

    def replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()

    def close(self) -> None:
        if self._graph is not None:
            self._graph.reset()
            self._graph = None


class StepGraph:
    """Takes steps, the first ``WARM_UP`` of a shape as they are, then by replaying one that is recorded.

    Every call is a step of its own; nothing is done twice. When batches of another shape come (images that grow), the record
    is dropped, and a new one made.

    Args:
        work: a step: of pixels, targets and soft labels it makes scalars by name, and a bool scalar. It reads nothing else
            that changes but tensors that stay where they are, and its host never waits.
        recorder: of what it gives the device.

    Attributes:
        recorder: as given.
        replays: steps that were replays so far.
    """

    def __init__(self, work: Work, recorder: Recorder) -> None:
        self._work, self.recorder = work, recorder
        self._form: tuple | None = None
        self._given: list[Tensor] = []
        self._soft: SoftTargets | None = None
        self._warm = 0
        self._out: Outputs | None = None
        self.replays = 0

    def __call__(self, pixels: Tensor, targets: Tensor, soft: SoftTargets | None) -> Outputs:
        """One step. What it returns is overwritten by the next: it has to be read, copied or added up before, in the
        current stream."""
        given = [pixels, targets, *_tensors(soft)]
        form = (*((t.shape, t.dtype) for t in given), _kind(soft))
        if form != self._form:
            self.close()
            self._given, self._form = [_like(t) for t in given], form
            self._soft = _with(soft, self._given[2:])
        for kept, new in zip(self._given, given, strict=True):
            kept.copy_(new, non_blocking=True)
        if self._out is None and self._warm < WARM_UP:
            self._warm += 1
            return self.recorder.warm(self._run)
        if self._out is None:
            self._out = self.recorder.record(self._run)
        self.recorder.replay()
        self.replays += 1
        losses, good = self._out
        return dict(losses), good

    def close(self) -> None:
        """Lets go of the record and of the memory that it holds."""
        self._out, self._form, self._warm, self._given, self._soft = None, None, 0, [], None
        self.recorder.close()

    def _run(self) -> Outputs:
        return self._work(self._given[0], self._given[1], self._soft)


def recorder_for(device: torch.device) -> Recorder:
    """The recorder of a device."""
    return CudaRecorder(device)


def _tensors(soft: SoftTargets | None) -> tuple[Tensor, ...]:
    if soft is None:
        return ()
    if isinstance(soft.target_BC, TopK):
        return soft.target_BC.value_BK, soft.target_BC.index_BK
    return (soft.logits_BC,)


def _kind(soft: SoftTargets | None) -> tuple | None:
    """What is not a tensor of soft labels, and part of what is recorded."""
    if soft is None:
        return None
    top = (soft.target_BC.counts, soft.target_BC.remainder) if isinstance(soft.target_BC, TopK) else None
    return soft.class_counts, soft.names, top


def _with(soft: SoftTargets | None, tensors: list[Tensor]) -> SoftTargets | None:
    """The same soft labels in other tensors."""
    if soft is None:
        return None
    its = soft.target_BC
    if isinstance(its, TopK):
        return SoftTargets(TopK(tensors[0], tensors[1], its.counts, its.remainder), soft.class_counts, soft.names)
    return SoftTargets(tensors[0], soft.class_counts, soft.names)


def _like(values: Tensor) -> Tensor:
    """Memory for such values, laid out alike."""
    return torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=values.device)
