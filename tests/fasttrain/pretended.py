"""A GPU that is not there: tensors stay in the CPU's memory and say that they are on ``cuda:0``.

Code then takes every branch that only a GPU takes. As on a GPU, tensors of two devices cannot be mixed, and whoever makes the
host wait for the device is found out. What a stream, an event or a graph does is not pretended: they do nothing. So this
shows names, devices and order of calls; it shows neither races nor figures of a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_GET = {getattr(Tensor, name).__get__: name for name in ("device", "is_cuda", "is_cpu", "grad", "data")}
_SET = {getattr(Tensor, name).__set__ for name in ("grad", "data")}
# one of their tensors may be on another device, or on none
_MIXES = {"copy_", "_foreach_copy_", "__getitem__", "__setitem__", "type_as", "to", "_has_compatible_shallow_copy_type"}
_READS = {"item", "__bool__", "__float__", "__int__", "__index__", "tolist", "nonzero", "unique", "bincount", "equal"}
_READS |= {"masked_select", "is_nonzero", "allclose", "repeat_interleave", "cpu", "numpy", "__contains__"}


class Waits(RuntimeError):
    """The host waits for the device."""


class PretendedGpu(TorchFunctionMode):
    """While it is entered, ``cuda`` is a device; see :func:`pretended_gpu`.

    Attributes:
        may_wait: whether the host may wait for the device; else :class:`Waits` is raised.
    """

    may_wait = True

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func in _GET:
            return self._got(_GET[func], func, args[0])
        if func in _SET:
            return func(*args)
        name = getattr(func, "__name__", "")
        its = list(_tensors((args, kwargs)))
        device = _common(name, its)
        self._look(name, args, kwargs, its)
        if name in ("to", "cpu", "cuda", "pin_memory", "is_pinned"):
            return self._moved(name, func, args, kwargs)
        if kwargs.get("device") is not None:
            device = _named(kwargs["device"])
            if device == GPU:
                kwargs["device"] = CPU
                if name in ("tensor", "as_tensor"):
                    self._wait(f"torch.{name} on a GPU")
        pinned = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            _mark(tensor, device or CPU)
            if pinned:
                tensor.untyped_storage().pinned = True
        return out

    def _got(self, name: str, get: Any, tensor: Tensor) -> Any:
        device = device_of(tensor)
        if name == "device":
            return device
        if name in ("is_cuda", "is_cpu"):
            return (device == GPU) == (name == "is_cuda")
        out = get(tensor)
        if isinstance(out, Tensor):
            _mark(out, device)
        return out

    def _look(self, name: str, args: tuple, kwargs: dict[str, Any], its: list[Tensor]) -> None:
        """Finds those who wait."""
        on_gpu = any(device_of(t) == GPU for t in its)
        if on_gpu and name in _READS:
            self._wait(name)
        if on_gpu and name in ("__getitem__", "__setitem__") and device_of(args[0]) == GPU:
            for index in _tensors(args[1]):
                if index.dtype == torch.bool or (device_of(index) == CPU and index.dim()):
                    self._wait("an index that is bool, or on the CPU")
        soon = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if name in ("copy_", "_foreach_copy_") and not soon and len({device_of(t) for t in its}) > 1:
            self._wait(name)

    def _moved(self, name: str, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensor, rest, at = args[0], list(args[1:]), device_of(args[0])
        pinned = getattr(_memory_of(tensor), "pinned", False)
        if name == "is_pinned":
            return pinned
        device = {"cpu": CPU, "cuda": GPU, "pin_memory": CPU}.get(name, at)
        if name == "pin_memory":
            assert at == CPU, "only the CPU's memory can be pinned"
        elif name == "to":
            if isinstance(kwargs.get("device"), (str, torch.device)):
                device = _named(kwargs.pop("device"))
            for i, value in enumerate(rest):
                if isinstance(value, (str, torch.device, Tensor)):
                    device = device_of(value) if isinstance(value, Tensor) else _named(value)
                    rest[i] = value.dtype if isinstance(value, Tensor) else CPU
                    break
            soon = kwargs.get("non_blocking", next((value for value in rest if isinstance(value, bool)), False))
            if device != at and not (soon and (pinned or device == CPU)):
                self._wait(f"to {device}")
        elif device != at and not kwargs.get("non_blocking", False):
            self._wait(name)
        out = func(tensor, *rest, **kwargs) if name == "to" else tensor
        if (device != at or name == "pin_memory") and out.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            out = out.clone()
        _mark(out, device)
        if name == "pin_memory":
            out.untyped_storage().pinned = True
        return out

    def _wait(self, what: str) -> None:
        if not self.may_wait:
            raise Waits(what)


@contextmanager
def pretended_gpu(monkeypatch) -> Iterator[PretendedGpu]:
    """One GPU, for the block: ``torch.cuda`` as far as our code asks it."""
    cuda, group = torch.cuda, torch._C._group_tensors_by_device_and_dtype
    plain = {"is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True}
    plain |= {"memory_allocated": 0, "memory_reserved": 0, "max_memory_allocated": 0, "manual_seed": None}
    plain |= {"mem_get_info": (1 << 36, 1 << 37), "get_device_name": "a GPU that is not there", "set_rng_state": None}
    plain |= {"synchronize": None, "set_device": None, "empty_cache": None, "reset_peak_memory_stats": None}
    plain |= {"is_current_stream_capturing": False, "get_rng_state": torch.zeros(16, dtype=torch.uint8)}
    for name, value in plain.items():
        monkeypatch.setattr(cuda, name, lambda *a, _value=value, **k: _value)
    stream = _Stream()
    monkeypatch.setattr(cuda, "Stream", _Stream)
    monkeypatch.setattr(cuda, "Event", _Event)
    monkeypatch.setattr(cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None, reset=lambda: None))
    monkeypatch.setattr(cuda, "graph", lambda graph, **how: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 0)
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: _mark(from_numpy(array), CPU))

    def grouped(lists, *rest):  # type: ignore[no-untyped-def]
        first = next((t for tensors in lists for t in tensors if t is not None), None)
        return {(GPU if device_of(first) == GPU else d, t): its for (d, t), its in group(lists, *rest).items()}

    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
    with PretendedGpu() as mode:
        yield mode


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded = False

    def record(self, stream: Any = None) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: "_Event") -> float:
        assert self.recorded and later.recorded
        return 1.0


class _Stream:
    device = GPU

    def __init__(self, device: Any = None) -> None:
        assert _named(device or GPU) == GPU

    def record_event(self) -> _Event:
        event = _Event()
        event.record()
        return event

    def wait_event(self, event: _Event) -> None:
        assert event.recorded

    def wait_stream(self, stream: "_Stream") -> None:
        assert isinstance(stream, _Stream)

    def synchronize(self) -> None: ...


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor says that it is; memory that only C++ has seen, as of gradients, is the CPU's until it is asked for."""
    with torch._C.DisableTorchFunction():
        if tensor.device.type != "cpu":
            return tensor.device
    return getattr(_memory_of(tensor), "pretended", CPU)


def _mark(tensor: Tensor, device: torch.device) -> Tensor:
    memory = _memory_of(tensor)
    if not hasattr(memory, "pretended") and device_of(tensor).type != "meta":
        memory.pretended = device
    return tensor


def _memory_of(tensor: Tensor) -> Any:
    """What goes with a tensor and its views; something new of those that stand for several, as inside ``torch.func.vmap``."""
    with torch._C.DisableTorchFunction():
        try:
            return tensor.untyped_storage()
        except NotImplementedError:
            return SimpleNamespace()


def _named(device: Any) -> torch.device:
    return GPU if torch.device(device).type == "cuda" else torch.device(device)


def _common(name: str, its: list[Tensor]) -> torch.device | None:
    """Of tensors that are worked on together.

    Raises:
        RuntimeError: there are two.
    """
    known = {getattr(_memory_of(t), "pretended", None) for t in its if t.dim() or name in _MIXES} - {None}
    if len(known) > 1 and name not in _MIXES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found two")
    if name == "__getitem__":
        return device_of(its[0])
    return GPU if any(device_of(t) == GPU for t in its) else CPU if its else None


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
