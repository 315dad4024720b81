"""What to compute on, and in which type."""

import ctypes
import os

import torch

from . import ranks
from .recipe import Recipe, Run


def choose_device(name: str) -> torch.device:
    """The device a recipe names; ``auto`` is the first GPU, else the CPU.

    Raises:
        ValueError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"run.device: {name!r} is none of auto, cpu, cuda, cuda:0, ..") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"run.device: {name!r} is none of auto, cpu, cuda, cuda:0, ..")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"run.device: {name} is not here; this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def own_device(name: str) -> torch.device:
    """The device of this process: as :func:`choose_device`, but with several on a machine each has a GPU of its own."""
    device, its = choose_device(name), ranks.here()
    if its.several and device.type == "cuda":
        if device.index is not None:
            raise ValueError(
                f"run.device: {name} is one GPU, and here are {its.count} processes; set it to cuda or auto"
            )
        return torch.device("cuda", its.local % torch.cuda.device_count())
    return device


def choose_dtype(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type for autocast, and why."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU computes in it"
        return torch.float16, "the GPU does not compute in bf16"
    return torch.float32, "on a CPU bf16 is slower"


def choose_source_dtype(precision: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of the sources' arithmetic in a run of type ``dtype``.

    Rounded to bf16, EfficientNet-Lite0 names another class than in float32 for 2 to 3 % of photographs; rounded to float16
    for less than 1 % (docs/sources.md).
    """
    if precision != "auto":
        return choose_dtype(precision, device)[0]
    return torch.float16 if dtype == torch.bfloat16 and device.type == "cuda" else dtype


def cpu_name() -> str:
    """The CPU, as Linux names it."""
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def set_up(run: Run, device: torch.device) -> None:
    """Settings of the process: threads; on a CPU, denormal numbers count as zero, which are many times slower, and memory is
    kept for the next step."""
    its = ranks.here()
    if run.threads:
        torch.set_num_threads(run.threads)
    elif its.several:  # torchrun would leave each process one thread
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // its.local_count, 1))
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        keep_memory()


def keep_memory() -> bool:
    """Makes the C library keep freed memory for the next step; False where it is not glibc's.

    By itself it gives every large tensor's memory back to the kernel, which clears and maps it page by page when the next step
    asks for it: about half of a training step on a CPU (`fasttrain bench step`, row "paper-style, memory kept").
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
    kept = mallopt(m_mmap_threshold, 1 << 30) or mallopt(m_mmap_max, 0)  # older versions allow no more than 32 MiB
    return bool(kept and mallopt(m_trim_threshold, -1))


def choose_compile(wanted: bool | str, device: torch.device) -> tuple[str, str]:
    """``off``, ``on``, ``graphs`` or ``step``, and why.

    Raises:
        ValueError: CUDA graphs without CUDA.
    """
    if wanted in ("graphs", "step") and device.type != "cuda":
        raise ValueError(f"run.compile: {wanted} needs a CUDA device")
    if wanted == "auto":
        return ("on", "on a GPU") if device.type == "cuda" else ("off", "slow to start on a CPU; see run.compile")
    if isinstance(wanted, str):
        return wanted, "as asked"
    return "on" if wanted else "off", "as asked"


def check_step(recipe: Recipe, dtype: torch.dtype) -> None:
    """Insists that ``run.compile: step`` can record steps of a run.

    Raises:
        ValueError: what no graph can hold is done at every step.
    """
    count = ranks.here().count
    instead = "set run.compile to true or graphs"
    if count > 1:
        raise ValueError(f"run.compile: step is of one process, and here are {count}; {instead}")
    if recipe.run.accumulate > 1:
        raise ValueError(
            f"run.compile: step takes a batch at once, not in run.accumulate {recipe.run.accumulate} parts; {instead}"
        )
    if dtype == torch.float16:
        raise ValueError(
            "run.compile: step knows no loss scaler, which float16 needs; set run.precision to bf16 or fp32, or "
            "run.compile to true or graphs"
        )
    if recipe.optim.impl != "torch":
        raise ValueError(f"run.compile: step is of torch's optimiser, not optim.impl {recipe.optim.impl}; {instead}")
    if recipe.run.cosine_every == 1:
        raise ValueError(f"run.compile: step measures no cosines, and run.cosine_every 1 wants them always; {instead}")
