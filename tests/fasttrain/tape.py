"""Stands for a CUDA graph on a CPU: a recorder of what is computed, below autograd, which repeats that and no Python.

As with a graph, a replay does the same operations on the same memory, and what was allocated while recording is what the
outputs lie in. As with a graph, recording fails where the host would read a number. Unlike a capture, recording also computes;
the first replay therefore does nothing, and no step is taken twice.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default}


class Tape:
    """A :class:`fasttrain.step_graph.Recorder`.

    Attributes:
        warmed, recorded, replayed: how often each was done.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._calls: list[tuple[Any, tuple, dict[str, Any], list[Tensor]]] = []
        self._computed = False
        self._out: Any = None
        self.warmed = self.recorded = self.replayed = 0

    def warm(self, work: Callable[[], T]) -> T:
        self.warmed += 1
        return work()

    def record(self, work: Callable[[], T]) -> T:
        self.recorded += 1
        self._calls = []
        with _Listening(self._calls):
            out = work()
        self._computed, self._out = True, out
        return out

    def replay(self) -> None:
        self.replayed += 1
        if self._computed:
            self._computed = False
            return
        for value in _tensors(self._out):
            value.fill_(True if value.dtype == torch.bool else float("nan"))
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, made in self._calls:
                for old, new in zip(made, _tensors(function(*args, **kwargs)), strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)

    def close(self) -> None:
        self._calls, self._out = [], None


class _Listening(TorchDispatchMode):
    def __init__(self, calls: list[tuple[Any, tuple, dict[str, Any], list[Tensor]]]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in _READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, _tensors(out)))
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
