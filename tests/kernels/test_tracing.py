"""What PyTorch's compiler and tracers see of the fused losses: whole operators here, the kernel itself on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from fasttrain.kernels import SoftTargetLoss, soft_target_loss

from .test_soft_target import DEVICE, FORMS, as_form, on

COUNTS = (20, 12)


@pytest.mark.parametrize("form", FORMS)
def test_operators_pass_opcheck(form, need):
    need("triton")
    from fasttrain.kernels import fused
    from fasttrain.kernels.problem import problem_of

    problem = problem_of(COUNTS, "kd", 2.0, "batchmean")
    student = torch.randn(6, 32, device=DEVICE, requires_grad=True)
    value, index, code, k_counts = fused._form_of(on(DEVICE, as_form(form, torch.randn(6, 32), COUNTS, 3)))
    plan = fused.plan_of(problem, k_counts, torch.float32, student.device)
    sizes, weight = plan.tiles.sizes, torch.tensor([1, 0, 1, 1, 1, 0], dtype=torch.bool, device=DEVICE)
    given = (student, value, index, weight, weight.sum(dtype=torch.float32), plan.ints, plan.floats, sizes, True, code)
    torch.library.opcheck(fused._loss_op, given)
    torch.library.opcheck(fused._grad_op, (given[0].detach(), *given[1:], torch.rand(2, device=DEVICE)))


@pytest.mark.parametrize("form", FORMS)
def test_compiled_without_a_graph_break(form, need):
    """Batches of two sizes, weighted rows, the gradient of something that goes on after the loss."""
    need("triton")
    calls: list = []
    options = {"kind": "kd", "temperature": [2.0, 1.0], "implementation": "triton"}
    module = SoftTargetLoss(COUNTS, **options)

    def step(student, target, weight):
        loss_M = soft_target_loss(student * 1.5, target, COUNTS, valid_B=weight, **options)
        return loss_M[0] + 0.1 * loss_M[1] ** 2 + module(student, target, weight).sum()

    def counting(graph, inputs):
        calls.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counting)
    for batch in (6, 9, 11):
        student = torch.randn(batch, 32, device=DEVICE)
        target = on(DEVICE, as_form(form, torch.randn(batch, 32), COUNTS, 3))
        weight = (torch.rand(batch) < 0.7).to(DEVICE)
        results = []
        for function in (step, compiled):
            leaf = student.clone().requires_grad_()
            loss = function(leaf, target, weight)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        assert torch.allclose(results[0][0], results[1][0]) and torch.allclose(results[0][1], results[1][1])
    assert len(calls) <= 2, "a new graph for each batch size"


TRACE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from torch._dynamo.backends.common import aot_autograd
from fasttrain.kernels import fused
from fasttrain.kernels.problem import problem_of

class Driver:  # stands in for the GPU's, which the analysis of what a kernel writes asks for its target
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
assert not fused.INTERPRETED

def shown(graph, inputs):
    def pretended(*arguments):
        outputs = graph.graph.find_nodes(op="output")[0].args[0]
        return [o if o is None else torch.zeros(o.meta["val"].shape, dtype=o.meta["val"].dtype) for o in outputs]
    for node in graph.graph.nodes:
        if node.op == "call_function":
            print(node.target, node.kwargs.get("tensors_to_clone", ""), node.kwargs.get("grid", ""))
    print("end")
    pretended._boxed_call = True
    return lambda *a: pretended(*a)

problem = problem_of((20, 12), "kd", 2.0, "batchmean")
student, target = torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True), torch.randn(8, 32, dtype=torch.bfloat16)
step = torch.compile(lambda s, t: fused.fused(problem, s, t, None).sum(), fullgraph=True, backend=aot_autograd(fw_compiler=shown))
step(student, target).backward()
"""


def test_the_compiler_sees_the_kernel_itself(need):
    """As on a GPU (the operators are then made of traceable kernels): one launch each way, nothing copied."""
    need("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", TRACE], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    forward, backward = (part.strip().splitlines() for part in run.stdout.split("end")[:2])
    for graph, written in ((forward, "partial_loss"), (backward, "grad")):
        kernels = [line for line in graph if line.startswith("triton_kernel_wrapper_functional")]
        assert kernels == [f"triton_kernel_wrapper_functional ['{written}'] [(1, 2, 1)]"]
        copies = {line.split()[0] for line in graph if "clone" in line or "copy" in line}
        # before PyTorch 2.15: two tensors of a few numbers (kernels/fused.py)
        assert copies <= (set() if torch.__version__ >= "2.15" else {"aten.lift_fresh_copy.default"})


def test_the_compiled_reference():
    """What `compiled` runs: the reference through Inductor, without a graph break."""
    code = """
import torch
from fasttrain.kernels import soft_target_loss
torch.set_num_threads(1)
student, target = torch.randn(16, 32), torch.randn(16, 32)
valid = torch.rand(16) < 0.7
for kind in ("ce", "kd"):
    out = []
    for implementation in ("reference", "compiled"):
        leaf = student.clone().requires_grad_()
        loss = soft_target_loss(leaf, target, (20, 12), kind=kind, temperature=2.0, valid_B=valid, implementation=implementation)
        loss.sum().backward()
        out += [loss, leaf.grad]
    assert torch.allclose(out[0], out[2], rtol=1e-5) and torch.allclose(out[1], out[3], rtol=1e-5, atol=1e-8)
assert not torch._dynamo.utils.counters["graph_break"]
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
