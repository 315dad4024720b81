"""What the Triton kernels need of a GPU, found without one: compiled ahead of time for several architectures.

    python -m fasttrain.kernels.resources [PART ..] [--json]

prints registers, spilled bytes and shared memory of each variant whose line has all the parts ("sm_90 kd", say). It
must run without TRITON_INTERPRET, whose functions cannot be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: its constant arguments, the types of the others."""

    name: str
    kernel: object
    signature: dict[str, str]
    constants: Mapping[str, object]
    warps: int


@dataclass(frozen=True)
class Resources:
    """Of one variant on one architecture.

    Attributes:
        registers: of a thread.
        spilled: bytes.
        shared: bytes of memory, of a block.
        load_bytes: of the widest load or store of a thread.
    """

    name: str
    architecture: int
    registers: int
    spilled: int
    shared: int
    warps: int
    load_bytes: int


SIZES = {"10": (10,), "1000+365": (1000, 365), "4096": (4096,), "10+21841": (10, 21841)}
STAGES = {  # the passes differ in what they write; the gradient does not depend on the kind
    "forward, ce": {"KD": False, "LOSS": True, "GRAD": True, "CHECK": False, "KEEP": True, "REMEMBER": False},
    "forward, kd": {"KD": True, "LOSS": True, "GRAD": True, "CHECK": False, "KEEP": True, "REMEMBER": False},
    "backward": {"KD": False, "LOSS": False, "GRAD": True, "CHECK": True, "KEEP": False, "REMEMBER": True},
}


def variants() -> Iterator[Variant]:
    """The specialisations of training and of the benchmarks: every form, pass and size, with weighted rows."""
    from .pixels_kernel import BLOCK, WARPS, pixels_kernel
    from .soft_target_kernel import LOGITS, PROBABILITIES, TOPK_DROP, TOPK_UNIFORM, soft_target_kernel
    from .tiles import tiles_of

    forms = {"logits": LOGITS, "probabilities": PROBABILITIES, "top-k": TOPK_UNIFORM, "top-k dropped": TOPK_DROP}
    for (classes, counts), (form_name, form), (stage, flags), held, wide in product(
        SIZES.items(), forms.items(), STAGES.items(), ("*bf16", "*fp32"), (False, True)
    ):
        if held == "*fp32" and form != LOGITS:
            continue
        if wide and (form != LOGITS or classes == "10" or stage == "forward, ce"):
            continue
        groups = (8 if held == "*bf16" else 4, classes != "4096") if wide else (1, False)
        top_k = form in (TOPK_UNIFORM, TOPK_DROP)
        tiles = tiles_of(counts, tuple(min(32, c) for c in counts) if top_k else (), groups=groups)
        constants = flags | {
            "FORM": form, "WEIGHTED": True, "DOUBLE": False, "R": tiles.r, "N": tiles.n, "R_SMALL": tiles.r_small,
            "N_SMALL": tiles.n_small, "K": tiles.k, "LOOP": bool(tiles.loop), "WIDE": tiles.wide, "EDGES": bool(tiles.edges),
        }  # fmt: skip
        types = dict.fromkeys(["partial_loss", "floats", "weight_sum", "upstream_M", "used_M", "remembered_M"], "*fp32")
        types |= {"student": held, "grad": held, "target": held if form == LOGITS else "*fp16"}
        types |= {"index": "*i32", "weight": "*i1", "ints": "*i32"} | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "i32") for name in soft_target_kernel.arg_names}
        name = f"soft target, {form_name}, {held[1:]}, {classes} classes, {stage}{', in groups' * wide}"
        yield Variant(name, soft_target_kernel, signature, constants, tiles.warps)
    for held, resize in product(("*bf16", "*fp16", "*fp32"), (False, True)):
        types = {"pixels": "*u8", "mean": "*fp32", "std": "*fp32", "out": held}
        constants = {"OUT_H": 224, "OUT_W": 224, "RESIZE": resize, "BLOCK": BLOCK}
        types |= dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "i32") for name in pixels_kernel.arg_names}
        yield Variant(f"pixels, {held[1:]}{', resized' * resize}", pixels_kernel, signature, constants, WARPS)


def compiled(variant: Variant, architecture: int) -> Resources:
    """Compiles one variant to machine code and reads what the assembler says of it.

    Raises:
        RuntimeError: the assembler's message.
    """
    fn = variant.kernel
    pointers = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(fn.arg_names)  # type: ignore[attr-defined]
        if variant.signature[a].startswith("*")
    }
    source = ASTSource(fn, variant.signature, variant.constants, pointers)
    target = GPUTarget("cuda", architecture, 32)
    binary = triton.compile(source, target=target, options={"num_warps": variant.warps, "enable_fp_fusion": True})
    return measured(variant.name, binary, architecture)


def measured(name: str, binary: Any, architecture: int) -> Resources:
    """What Triton's machine code of a kernel needs."""
    ptx = binary.asm["ptx"]
    registers, spilled = _assembled(ptx, architecture)
    moved = re.findall(r"(?:ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bf](\d+) ", ptx)
    widest = max(int(count or 1) * int(bits) // 8 for count, bits in moved)
    metadata = binary.metadata
    return Resources(name, architecture, registers, spilled, metadata.shared, metadata.num_warps, widest)


def _assembled(ptx: str, architecture: int) -> tuple[int, int]:
    target = re.search(r"^\.target (\S+?)(?:,|$)", ptx, re.M)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    said = run.stderr + run.stdout
    if run.returncode:
        raise RuntimeError(f"ptxas: {said[-2000:]}")
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert registers is not None and spills, said
    return int(registers[1]), sum(map(int, spills))


def main(arguments: list[str]) -> None:
    """Prints a line for each variant and architecture, or JSON."""
    parts = [a for a in arguments if a != "--json"]
    chosen = [(v, a) for v in variants() for a in ARCHITECTURES if all(p in f"sm_{a} {v.name}" for p in parts)]
    rows = (compiled(v, a) for v, a in chosen)
    if "--json" in arguments:
        print(json.dumps([asdict(r) for r in rows]))
        return
    for r in rows:
        print(
            f"sm_{r.architecture:<4}{r.registers:4} registers {r.spilled:5} bytes spilled {r.shared:6} bytes shared "
            f"{r.warps:3} warps {r.load_bytes:3} bytes a load  {r.name}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
