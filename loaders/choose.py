"""What ``data.loader: auto`` means here, and why.

Which loader is best for what is data: :data:`RULES`, best first. A rule names the result that it comes from; one without says
so, in the run's log and in ``fasttrain doctor``.
"""

import os
from dataclasses import dataclass

import torch

from .base import LoaderSpec
from .datasets.base import Encoded
from .datasets.beton import Packed
from .parts import missing_part
from .show import load_libjpeg
from .video import Clips

PACKED, FILES = "packed files", "other files"
_SHORT = {"ffcv": "FFCV", "dali": "DALI"}


@dataclass(frozen=True)
class Rule:
    """A loader that is taken where it can be, and no rule above it applies.

    Attributes:
        data: ``PACKED`` (a ``.beton``) or ``FILES`` (image files, or shards of them).
        device: type of the device that the batches go to.
        loader: its name.
        result: the file under ``benchmarks/results/`` in which it was the fastest of those in the rules for this data and
            device; empty where that was not measured.
        note: why it is here nevertheless.
    """

    data: str
    device: str
    loader: str
    result: str = ""
    note: str = ""

    @property
    def why(self) -> str:
        """What stands behind it, in words."""
        return f"measured, {self.result}" if self.result else self.note


_CPU = "2026-11-21-loaders-cpu.json"
_UNSEEN = f"not yet measured on a GPU; on the CPU the fastest, {_CPU}"
RULES = (
    Rule(PACKED, "cpu", "ffcv", result=_CPU),
    Rule(PACKED, "cuda", "ffcv", note=_UNSEEN),
    Rule(PACKED, "cuda", "dali", note="not yet measured on a GPU; it leaves the CPU free"),
    Rule(FILES, "cuda", "dali", note="not yet measured on a GPU; it leaves the CPU free"),
)
"""What measured best, best first; where none of it can be used, ``torch``, which reads everything."""


def choose_loader(spec: LoaderSpec, device: torch.device | str = "cpu") -> tuple[str, str]:
    """(loader, why): video for clips; resident where the decoded split fits into a quarter of the memory; else the first of
    :data:`RULES` that can be used here; else torch."""
    device = torch.device(device)
    if spec.clip is not None:
        slow = isinstance(spec.dataset.read, Clips) and spec.dataset.read.in_files
        return "video", "clips" + ("; `fasttrain pack` makes a file that loads faster" if slow else "")
    fits, sizes = _fits(spec, device)
    if fits:
        return "resident", sizes
    if not isinstance(spec.dataset.read, Encoded) or spec.stored:
        return "torch", sizes
    data = PACKED if isinstance(spec.dataset.read, Packed) else FILES
    rule, without = _first(data, device.type)
    absent = "".join(f", and {_SHORT[name]} is not here ({why})" for name, why in without.items())
    if rule is not None:
        what = "a packed file" if data == PACKED else "files that a GPU can decode"
        return rule.loader, f"{what}{absent} ({rule.why}); {sizes}"
    if data == PACKED:
        return "torch", f"SLOW: a packed file{absent}; {sizes}"
    return "torch", f"{sizes}; `fasttrain pack` makes a file that loads faster"


def chosen_here(device: str) -> str:
    """What :func:`choose_loader` takes on this machine for packed files and for others, and why, in one line."""
    parts = []
    for data in (PACKED, FILES):
        rule, without = _first(data, device)
        absent = "".join(f"; no {name}: {why}" for name, why in without.items())
        if rule is not None:
            parts.append(f"{data}: {rule.loader} ({rule.why}{absent})")
        else:
            slow = ", which is SLOW" if data == PACKED else ""
            parts.append(f"{data}: torch{slow}" + (f" ({absent.removeprefix('; ')})" if absent else ""))
    return "; ".join(parts)


def _first(data: str, device: str) -> tuple[Rule | None, dict[str, str]]:
    """The first rule whose loader can be used here; and the loaders before it, with what is missing."""
    without: dict[str, str] = {}
    for rule in RULES:
        if (rule.data, rule.device) == (data, device):
            missing = (
                missing_part("nvidia.dali") if rule.loader == "dali" else missing_part("ffcv") or _missing_libjpeg()
            )
            if not missing:
                return rule, without
            without[rule.loader] = missing
    return None, without


def _missing_libjpeg() -> str:
    try:
        load_libjpeg()
    except ValueError as error:
        return str(error)
    return ""


def _fits(spec: LoaderSpec, device: torch.device) -> tuple[bool, str]:
    """Whether the decoded split fits into a quarter of the device's memory, and the sizes in words."""
    read = spec.dataset.read
    if not spec.stored and isinstance(read, Packed):
        sides = {(h, w) for h, w in zip(read.file.height_N[spec.index_N], read.file.width_N[spec.index_N], strict=True)}
        if len(sides) > 1:
            return False, "images of several sizes"
        ((height, width),) = sides
    elif spec.stored:
        height = width = spec.stored
    elif isinstance(read, Clips):
        sides = set(map(tuple, read.shape_N3[spec.index_N, 1:].tolist()))
        if len(sides) > 1:
            return False, "videos of several sizes, or some that cannot be read"
        ((height, width),) = sides
    elif spec.dataset.name in ("folder", "imagenet", "list", "places365", "tar", "voc"):
        return False, "files of any size are not resident unless data.stored gives them one"
    else:
        height, width = read(int(spec.index_N[0])).shape[:2]
    need = len(spec.index_N) * 3 * (int(height) * int(width) + (spec.still**2 if spec.stored else 0))
    free = _free_memory(device)
    sizes = f"{need / 2**30:.2f} GiB decoded, {free / 2**30:.1f} GiB free on {device}"
    return need * 4 <= free, sizes if need * 4 <= free else f"too large to be resident: {sizes}"


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not os.path.exists("/proc/meminfo"):
        return 0
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
