"""What is launched past Triton's own look at the arguments is what Triton would have launched.

A process without the interpreter, in which launches are written down (driver.py): kernels are compiled, none runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

CODE = """
import json, torch
import driver
driver.install()
from fasttrain.kernels import SoftTargetLoss, TopK, fused, launch
from fasttrain.kernels.problem import problem_of
from fasttrain.kernels.tiles import Tiling

def kind(x):  # of an argument: all that a kernel is compiled for, and what it is given
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), tuple(x.stride()), x.data_ptr() % 16
    return x

def launched():
    out = [(function, grid, [kind(x) for x in arguments]) for function, grid, arguments in driver.LAUNCHES]
    driver.LAUNCHES.clear()
    return out

def logits(rows, begin=0):
    return torch.zeros(rows * 32 + begin, dtype=torch.bfloat16)[begin:].view(rows, 32)

by_triton = 0
def counted(*given, **named):
    global by_triton
    by_triton += 1
    return triton_run(*given, **named)

kernel = fused.soft_target_kernel
triton_run, kernel.run = kernel.run, counted
problem, state = problem_of((20, 12), "kd", 2.0, "batchmean"), fused.State()
top = TopK(torch.zeros(16, 4).half(), torch.zeros(16, 4).short(), (2, 2))
cases = {
    "plain": (logits(16), logits(16), None, Tiling()),
    "weights": (logits(16), logits(16), torch.ones(16).bool(), Tiling()),
    "top-k": (logits(16), top, None, Tiling()),
    "in groups": (logits(16), logits(16), None, Tiling(wide=True)),
    "in groups, begins 2 bytes late": (logits(16, 1), logits(16), None, Tiling(wide=True)),
}

def run(name):
    student, target, weight, tiling = cases[name]
    before = by_triton
    # the upstream gradient of a sum is one number for all sources, of stride 0
    fused.fused(problem, student.requires_grad_(), target, weight, state, tiling).sum().backward()
    return launched(), by_triton - before

direct = fused.launch
fused.launch = lambda kernel, key, grid, arguments, warps: kernel[grid](*arguments, num_warps=warps)
tritons = {name: run(name) for name in cases}
fused.launch = direct
first = {name: run(name) for name in cases}
again = {name: run(name) for name in cases}
result = {
    name: {
        "same": [first[name][0] == launches, again[name][0] == launches],
        "by_triton": [count, first[name][1], again[name][1]],
        "code": str(hash(tuple(code for code, *_ in launches))),
    }
    for name, (launches, count) in tritons.items()
}
print(json.dumps(result))
"""


def test_the_same_kernels_get_the_same_arguments(need):
    need("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    cases = json.loads(run.stdout)
    for name, case in cases.items():
        assert case["same"] == [True, True], name
        assert case["by_triton"] == [2, 2, 0], name  # forward and backward, looked at once
    assert len({case["code"] for case in cases.values()}) == len(cases), "each needs machine code of its own"
