"""The fused losses where they are meant to run: launches, synchronisation, graphs, Inductor. Their values: tests/kernels."""

import pytest
import torch
from fasttrain.kernels import SoftTargetLoss, TopK, network_input, soft_target_loss

pytestmark = pytest.mark.gpu
COUNTS = (1000, 365)


@pytest.fixture(params=["auto", "triton"])
def loss(request) -> SoftTargetLoss:
    module = SoftTargetLoss(COUNTS, kind="kd", temperature=2.0, implementation=request.param)
    assert module.implementation == "triton"
    return module


def batch(rows: int, dtype=torch.bfloat16):
    student, target = (torch.randn(rows, sum(COUNTS), device="cuda").mul_(3).to(dtype) for _ in range(2))
    return student.requires_grad_(), target


def step(module, student, target, weight=None, factor: float = 1.0) -> None:
    student.grad = None
    (module(student, target, weight).sum() * factor).backward()


def test_three_launches(loss):
    student, target = batch(512)
    module_losses = torch.ones(2, device="cuda")
    step(loss, student, target)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        student.grad = None
        loss(student, target).backward(module_losses)
        torch.cuda.synchronize()
    names = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) <= 3, names


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_waits_for_the_device(loss, weighted):
    student, target = batch(256)
    weight = torch.rand(256, device="cuda") < 0.5 if weighted else None
    step(loss, student, target, weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for factor in (1.0, 0.5, 0.5):
            step(loss, student, target, weight, factor)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_a_cuda_graph(loss):
    student, target = batch(128)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(loss, student, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    student.grad = None
    with torch.cuda.graph(graph):
        total = loss(student, target).sum()
        total.backward()
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
    graph.replay()
    again = student.detach().clone().requires_grad_()
    expected = loss(again, target).sum()
    expected.backward()
    assert torch.equal(total, expected) and torch.equal(student.grad, again.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compiled_by_inductor(dtype):
    def total(student, target, weight):
        return (soft_target_loss(student, target, COUNTS, kind="kd", temperature=2.0, valid_B=weight) * 0.3).sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True)
    for rows in (64, 96, 33):
        student, target = batch(rows, dtype)
        weight = torch.rand(rows, device="cuda") < 0.7
        results = []
        for function in (total, compiled):
            student.grad = None
            out = function(student, target, weight)
            out.backward()
            results.append((out.detach(), student.grad))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-7)
        assert torch.equal(results[0][1], results[1][1])


def test_top_k_classes_are_written_last():
    """The k classes' gradient is stored over the dense one's by other threads: many times, always the same."""
    student = torch.randn(4096, 1000, device="cuda", requires_grad=True)
    tops = (torch.randn(4096, 1000, device="cuda") * 4).softmax(1).topk(32, dim=1)
    target = TopK(tops.values.half(), tops.indices.to(torch.int16), (32,))
    gradients = []
    for implementation in ("reference", "triton", "triton", "triton"):
        student.grad = None
        soft_target_loss(student, target, [1000], implementation=implementation).sum().backward()
        gradients.append(student.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-9)
    assert torch.equal(gradients[1], gradients[2]) and torch.equal(gradients[1], gradients[3])


def test_more_elements_than_int32_counts():
    student = torch.randn(110_000, 20_000, device="cuda", dtype=torch.bfloat16)
    loss = soft_target_loss(student, student, [20_000], kind="kd", implementation="triton")
    assert float(loss) == 0
    last = soft_target_loss(student[-8:], student[:8], [20_000], implementation="reference")
    weight = torch.zeros(110_000, device="cuda")
    weight[-8:] = 1
    target = student.roll(8, 0)
    target[-8:] = student[:8]
    assert torch.allclose(soft_target_loss(student, target, [20_000], valid_B=weight), last, rtol=1e-5)


def test_another_stream():
    """Launched on the stream that is current, on the device of its tensors."""
    student, target = batch(4096)
    expected = soft_target_loss(student, target, COUNTS)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        fresh = (student.detach() + 0).requires_grad_()  # the same kernel: another one may add in another order
        loss = soft_target_loss(fresh, target, COUNTS)
    torch.cuda.synchronize()
    assert torch.equal(loss, expected)


def test_network_input():
    pixels = torch.randint(0, 256, (8, 3, 96, 96), dtype=torch.uint8, device="cuda")
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor([120.0, 110, 100], device="cuda"), torch.tensor([60.0, 61, 62], device="cuda")
    for size in (0, 224):
        plain, fused = (network_input(pixels, mean, std, size=size, implementation=i) for i in ("plain", "triton"))
        torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-5)
