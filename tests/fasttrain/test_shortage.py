"""Out of memory, in PyTorch's, cuDNN's, numpy's and the kernel's words: one sentence that names what of the recipe takes less."""

import os

import numpy as np
import pytest
import torch

from fasttrain import build, compare
from fasttrain.recipe import Recipe, load
from fasttrain.shortage import explained, levers

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def _said(error: Exception, recipe: Recipe, device: torch.device = CPU) -> str:
    with pytest.raises(ValueError) as caught, explained(recipe, device):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


@pytest.fixture
def gpu_memory(monkeypatch):
    for name, value in (
        ("memory_allocated", 36 << 30),
        ("memory_reserved", 37 << 30),
        ("mem_get_info", (1 << 30, 40 << 30)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)


CUDA = {
    "an allocation": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "),
    "cuDNN": (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuBLAS": (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "DALI": (RuntimeError, "Error in operator `nvidia.dali.fn.decoders.image`: Can't allocate 1073741824 bytes on device 0."),
    "nvImageCodec": (RuntimeError, "nvImageCodec failure: device allocator failed"),
    "the driver": (RuntimeError, "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
}  # fmt: skip


@pytest.mark.parametrize("case", CUDA)
def test_a_gpu(case, gpu_memory):
    kind, text = CUDA[case]
    said = _said(kind(text), load("demo", ["--data.batch", "256"]), GPU)
    asked = "2.00 GiB were asked for; " if "Tried" in text else "1.00 GiB were asked for; " if "107374" in text else ""
    assert said.startswith(
        f"out of memory on cuda: {asked}this process uses 36.00 GiB and keeps 1.00 GiB more for its next "
    )
    assert "; 1.00 of 40.00 GiB are free. Try, best first: " in said and "data.batch 128 (is 256;" in said


def test_dali_has_a_lever():
    assert "data.loader" in _names("--data.loader", "dali") and "data.loader" not in _names("--data.loader", "torch")


def test_building_a_run_is_explained_too(smoke, monkeypatch):
    """Networks, resident images and sources are made before the first step."""
    (job,) = compare.jobs_of(smoke())
    for module, name in ((compare, "build"), (build.Parts, "open_sources")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *given: torch.empty(2**50))
            with pytest.raises(
                ValueError, match=r"^out of memory: 4194304\.00 GiB were asked for; .* Try, best first: "
            ):
                compare.run(job.recipe, lambda label, line: None)


def test_an_allocation_that_fails_on_this_cpu():
    with pytest.raises(ValueError, match=r"^out of memory: ") as caught, explained(load("smoke"), CPU):
        torch.empty(2**50)
    assert "4194304.00 GiB were asked for; this process uses " in str(caught.value)
    with pytest.raises(ValueError, match=r"^out of memory: 32\.0 PiB were asked for"), explained(load("smoke"), CPU):
        np.empty(2**55, np.uint8)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                     "allocate 1073741824 bytes. Error code 12 (Cannot allocate memory)"),
        RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 1073741824 bytes."),
        MemoryError("Unable to allocate 1.00 GiB for an array with shape (1073741824,) and data type uint8"),
    ],
)  # fmt: skip
def test_a_cpu(error):
    said = _said(error, load("smoke", ["--data.batch", "32", "--data.loader", "torch", "--data.workers", "4"]))
    assert said.startswith("out of memory: 1.0") and " GiB were asked for; this process uses " in said
    assert "data.batch 16 (is 32;" in said and said.endswith("; data.workers 2 (is 4)")


def test_no_figure_is_no_matter():
    assert _said(MemoryError(), load("smoke")).startswith("out of memory: this process uses ")


@pytest.mark.parametrize("workers", [-1, 4])
def test_a_loaders_process_that_was_killed(workers):
    recipe = load("smoke", ["--data.loader", "torch", "--data.workers", str(workers), "--data.batch", "8"])
    fewer = (os.cpu_count() if workers < 0 else workers) // 2
    try:
        try:
            raise RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. ")
        except RuntimeError as error:
            raise RuntimeError("DataLoader worker (pid(s) 77) exited unexpectedly") from error
    except RuntimeError as error:
        said = _said(error, recipe)
    assert said.startswith("a process of the loader ") and "GiB are available" in said
    assert f"): try data.workers {fewer} (is {workers}), another data.loader than torch, or data.batch 4" in said


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared "
        "memory. Please try to raise your shared memory limit.",
        "unable to write to file </torch_12_34_0>: No space left on device (28); unable to mmap 4096 bytes from file of shm",
        "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)",
    ],
)
def test_shared_memory(text):
    said = _said(RuntimeError(text), load("smoke", ["--data.workers", "4"]))
    assert said.startswith("the loader's processes are out of shared memory (/dev/shm: ") and "--shm-size" in said
    assert "data.workers 0 (is 4)" in said


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), OSError(28, "No space left on device"), KeyError("x")]
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, explained(load("smoke"), CPU):
        raise error
    assert caught.value is error


def _names(*given: str, device: torch.device = GPU) -> list[str]:
    return [lever.split()[0] for lever in levers(load("demo", list(given)), device)]


def test_the_levers_are_those_of_the_recipe():
    assert _names("--data.views", "0", "--transfer.module", "true", "--run.precision", "fp32", "--run.compile", "graphs") == [
        "transfer.recompute", "run.accumulate", "run.precision", "transfer.recall", "transfer.bank", "data.loader", "run.compile",
        "data.batch", "data.size",
    ]  # fmt: skip
    recalled = _names("--data.views", "4", "--transfer.recompute", "true", "--transfer.module", "true")
    assert recalled == ["run.accumulate", "transfer.recall_gib", "data.loader", "data.batch", "data.size"]
    assert _names("--method.name", "scratch", "--data.loader", "torch", "--data.batch", "1", "--run.precision", "bf16",
                  device=CPU) == ["data.size"]  # fmt: skip
    clips = levers(load("demo", ["--data.frames", "16", "--data.name", "motion", "--target.model", "resnet3d18"]), CPU)
    assert (
        "data.frames 8 (is 16)" in clips
        and "data.loader video (is auto; resident keeps the whole set in memory)" in clips
    )
