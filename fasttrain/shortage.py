"""Out of memory: one sentence that says what was asked for, what there was, and which fields of this recipe take less."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .build import recalls
from .device import choose_dtype
from .recipe import Recipe

# What PyTorch, cuDNN, cuBLAS, DALI and the kernel say; MemoryError and torch.OutOfMemoryError need no words.
_DEVICE = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUFFT_ALLOC_FAILED|NCCL.*out of memory"
    # DALI, nvImageCodec, and CUDA's own words in theirs
    r"|Can't allocate \d+ bytes on device|CUDA allocation failed|cudaErrorMemoryAllocation|device allocator failed",
    re.IGNORECASE,
)
_HOST = re.compile(
    r"DefaultCPUAllocator|not enough memory|Cannot allocate memory|std::bad_alloc|cudaHostAlloc|CachingHostAllocator"
    r"|Can't allocate \d+ bytes on host|pinned allocator failed"
)
_WORKER = re.compile(r"DataLoader worker \(pid.*\) is killed by signal: Killed")
_SHARED = re.compile(r"out of shared memory|shared memory ?\(shm\)|unable to (mmap|allocate|write to) .*shm")
_ASKED = re.compile(
    r"[Tt]ried to allocate ([\d.]+ ?[KMGTPE]?i?B|\d+ bytes)|Unable to allocate ([\d.]+ ?[KMGTPE]?i?B)"
    r"|Can't allocate (\d+ bytes)"
)


@contextmanager
def explained(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Turns what is raised in the block for want of memory into a sentence with the fields that take less, best first.

    Args:
        recipe: that runs.
        device: the one it computes on.

    Raises:
        ValueError: memory of the device, of the machine, or shared between a loader's processes ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        said = _sentence(error, recipe, device)
        if said is None:
            raise
        raise ValueError(said) from error


def levers(recipe: Recipe, device: torch.device) -> list[str]:
    """What of this recipe takes memory of the device and can take less, with present values.

    First what leaves the training as it is or nearly so, then what changes it.
    """
    data, transfer, run = recipe.data, recipe.transfer, recipe.run
    gpu, chosen = device.type == "cuda", recipe.chosen_sources()
    out = []
    if transfer.module and chosen and not transfer.recompute:
        out.append("transfer.recompute true (is false)")
    if run.accumulate < data.batch:
        more = min(2 * run.accumulate, data.batch)
        out.append(f"run.accumulate {more} (is {run.accumulate}: parts of the batch; their batch norms see less)")
    if gpu and choose_dtype(run.precision, device)[0] == torch.float32:
        out.append(f"run.precision auto (is {run.precision})")
    if chosen and not recalls(recipe):
        views = "" if data.views or transfer.every_view else " with data.views 4 (is 0)"
        out.append(f"transfer.recall true{views}: sources run at every step, {len(chosen)} of them")
        if transfer.bank != "plain":
            out.append(f"transfer.bank plain (is {transfer.bank})")
    if recalls(recipe) and chosen and transfer.recall_gib:
        out.append(f"transfer.recall_gib 0 (is {transfer.recall_gib:g}: soft labels then stay in their file)")
    if data.loader in ("auto", "resident"):
        other = "video" if data.frames else "ffcv or torch"
        out.append(f"data.loader {other} (is {data.loader}; resident keeps the whole set in memory)")
    if gpu and data.loader == "dali":
        out.append("data.loader ffcv or torch (is dali, which decodes in memory of the device)")
    if gpu and run.compile in ("graphs", "step"):
        out.append(f"run.compile true (is {run.compile}: CUDA graphs keep memory of their own)")
    if data.batch > 1:
        out.append(f"data.batch {data.batch // 2} (is {data.batch}; optim.lr goes with it)")
    if data.frames:
        out.append(f"data.frames {max(data.frames // 2, 1)} (is {data.frames})")
    out.append(f"data.size {data.size * 3 // 4} (is {data.size} px)")
    return out


def _sentence(error: BaseException, recipe: Recipe, device: torch.device) -> str | None:
    """What to say, or None if the error is of another kind."""
    text = _texts(error)
    workers = f"data.workers {_fewer(recipe.data.workers)} (is {recipe.data.workers})"
    if _SHARED.search(text):
        return (
            f"the loader's processes are out of shared memory{_shm()}: give the machine or container a larger /dev/shm "
            f"(docker run --shm-size, a memory volume in Kubernetes), or try data.workers 0 (is {recipe.data.workers}), "
            f"data.batch {max(recipe.data.batch // 2, 1)} (is {recipe.data.batch})"
        )
    if _WORKER.search(text):
        return (
            f"a process of the loader was killed, as the kernel does when memory runs out ({_host_memory()}): try {workers}, "
            f"another data.loader than torch, or data.batch {max(recipe.data.batch // 2, 1)} (is {recipe.data.batch})"
        )
    on_device = isinstance(error, torch.OutOfMemoryError) or _DEVICE.search(text)
    if not (on_device or isinstance(error, MemoryError) or _HOST.search(text)):
        return None
    asked = _ASKED.search(text)
    wanted = f"{_bytes(asked[1] or asked[2] or asked[3])} were asked for; " if asked else ""
    if on_device and device.type == "cuda":
        return f"out of memory on {device}: {wanted}{_device_memory(device)}. Try, best first: {_list(recipe, device)}"
    more = [] if recipe.data.loader in ("resident", "synthetic") else [workers]
    return f"out of memory: {wanted}{_host_memory()}. Try, best first: {_list(recipe, device, more)}"


def _list(recipe: Recipe, device: torch.device, more: list[str] | None = None) -> str:
    return "; ".join([*levers(recipe, device), *(more or [])])


def _fewer(workers: int) -> int:
    return (workers if workers > 0 else os.cpu_count() or 2) // 2


def _texts(error: BaseException) -> str:
    """What an error says, and what it came from: a DataLoader hides the reason behind one of its own."""
    said, seen = [], set()
    while error is not None and id(error) not in seen:
        said.append(str(error))
        seen.add(id(error))
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return "\n".join(said)


def _bytes(text: str) -> str:
    return f"{int(text.split()[0]) / 2**30:.2f} GiB" if text.endswith("bytes") else text


def _device_memory(device: torch.device) -> str:
    """This process's memory on a GPU, and what the GPU has."""
    free, total = torch.cuda.mem_get_info(device)
    ours, kept = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    said = (
        f"this process uses {ours / 2**30:.2f} GiB and keeps {(kept - ours) / 2**30:.2f} GiB more for its next tensors"
    )
    return f"{said}; {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free"


def _host_memory() -> str:
    """This process's memory, and what the machine, or the container, has."""
    used = _field(Path("/proc/self/status"), "VmRSS")
    free, total = (_field(Path("/proc/meminfo"), name) for name in ("MemAvailable", "MemTotal"))
    said = f"this process uses {used / 2**30:.2f} GiB; {free / 2**30:.2f} of the machine's {total / 2**30:.2f} GiB are available"
    limit = _container_limit()
    return said + (f"; this container may use {limit / 2**30:.2f} GiB" if limit and limit < total else "")


def _field(path: Path, name: str) -> int:
    """A figure of one of the kernel's tables, in bytes; 0 where it is not there."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _container_limit() -> int:
    """Bytes that the control group allows; 0 for no limit."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            return int(Path(path).read_text())
    return 0


def _shm() -> str:
    try:
        place = os.statvfs("/dev/shm")
    except OSError:
        return ""
    size, free = place.f_blocks * place.f_frsize, place.f_bavail * place.f_frsize
    return f" (/dev/shm: {free / 2**20:.0f} of {size / 2**20:.0f} MiB are free)"
