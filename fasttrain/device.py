"""What to compute on, and in which type."""

import torch

from .recipe import Run


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


def choose_dtype(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type for autocast, and why."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU computes in it"
        return torch.float16, "the GPU does not compute in bf16"
    found = {"avx512_bf16", "amx_bf16"} & cpu_flags()
    if found:
        return torch.bfloat16, f"the CPU computes in it ({', '.join(sorted(found))})"
    return torch.float32, "the CPU has no bf16 arithmetic, and emulating it is slower"


def cpu_flags() -> set[str]:
    """Instruction sets of the CPU, as Linux names them."""
    with open("/proc/cpuinfo") as lines:
        return next((set(line.split()[2:]) for line in lines if line.startswith("flags")), set())


def cpu_name() -> str:
    """The CPU, as Linux names it."""
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def set_up(run: Run, device: torch.device) -> None:
    """Settings of the process: threads; denormal numbers count as zero on a CPU, where they are many times slower."""
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
