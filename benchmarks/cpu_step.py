"""Training steps of ResNet-20 on a CPU: precision, layout, compilation, and one process against two.

    python benchmarks/cpu_step.py [--size 24] [--batch 32] [--json FILE]

Rows are measured in turn, several times over, on fresh random images; medians. Each row runs in processes of its own, so
that none inherits another's threads.
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median
from typing import Any

WORKER = """
import json, sys, time, torch
from fasttrain.build import build_target
from fasttrain.device import set_up
from fasttrain.optim import build_optimiser
from fasttrain.recipe import Optim, Recipe, Run
a = json.loads(sys.argv[1])
set_up(Run(threads=a["threads"]), torch.device("cpu"))
torch.manual_seed(0)
target = build_target(Recipe(), 2, {}).train()
layout = torch.channels_last if a["channels_last"] else torch.contiguous_format
target = target.to(memory_format=layout)
optimiser = build_optimiser(Optim(), target)
model = torch.compile(target) if a["compile"] else target
dtype = torch.bfloat16 if a["bf16"] else torch.float32
targets = torch.randint(2, (a["batch"],))
def step():
    pixels = torch.randn(a["batch"], 3, a["size"], a["size"]).contiguous(memory_format=layout)
    start = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=a["bf16"]):
        out = model(pixels).logits_BK
    torch.nn.functional.cross_entropy(out.float(), targets).backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return time.perf_counter() - start
for _ in range(3):
    step()
print(a["batch"] / sorted(step() for _ in range(a["steps"]))[a["steps"] // 2])
"""

BASE: dict[str, Any] = {"threads": 2, "channels_last": True, "bf16": False, "compile": False, "processes": 1}
ROWS: dict[str, dict] = {
    "float32 channels_last": {},
    "float32 NCHW": {"channels_last": False},
    "bf16 channels_last": {"bf16": True},
    "compiled": {"compile": True},
    "one thread": {"threads": 1},
    "two processes of one thread": {"threads": 1, "processes": 2},
}


def images_per_s(row: dict, size: int, batch: int) -> float:
    """All processes together."""
    arguments = json.dumps(BASE | row | {"size": size, "batch": batch, "steps": 3 if row.get("bf16") else 15})
    command = [sys.executable, "-c", WORKER, arguments]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range((BASE | row)["processes"])]
    return sum(float(p.communicate()[0].split()[-1]) for p in running)


def main() -> None:
    """Measures and prints all rows."""
    from fasttrain.environment import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=24, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    start = time.time()
    repeats: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(arguments.repeats):
        for name, row in ROWS.items():
            repeats[name].append(images_per_s(row, arguments.size, arguments.batch))
    first = median(repeats[next(iter(ROWS))])
    rows: list[dict[str, Any]] = [
        {"name": n, "images_per_s": median(r), "relative_to": {next(iter(ROWS)): median(r) / first}, "repeats": r}
        for n, r in repeats.items()
    ]
    for row in rows:
        print(f"{row['name']:30} {row['images_per_s']:7.0f} images/s  x {row['images_per_s'] / first:.2f}")
    print(f"ResNet-20, {arguments.size} px, batch {arguments.batch}; {time.time() - start:.0f} s")
    if arguments.json:
        content = (
            {"suite": "cpu step", "size": arguments.size, "batch": arguments.batch} | environment() | {"rows": rows}
        )
        with open(arguments.json, "w") as file:
            json.dump(content | {"not_run": {}}, file, indent=1)


if __name__ == "__main__":
    main()
