"""The optional parts do their work here: a small real task for each. CI names them all in FASTTRAIN_REQUIRE."""

import os
import subprocess
import sys

import numpy as np
import pytest

from .loaders import samples


def test_ffcv_writes_and_reads_a_packed_file(need, tmp_path):
    need("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    image = samples.pixels(6, 16)
    rows = [(image[i], i * 10) for i in range(6)]
    path = str(tmp_path / "images.beton")
    DatasetWriter(
        path, {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=1
    ).from_indexed_dataset(rows)
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(path, 3, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    batches = [(x.copy(), y.copy()) for x, y in loader]
    assert (np.concatenate([x for x, _ in batches]) == image).all()
    assert np.concatenate([y for _, y in batches])[:, 0].tolist() == [0, 10, 20, 30, 40, 50]


def test_dali_decodes_on_the_cpu(need, tmp_path):
    need("dali")
    from nvidia.dali import fn, pipeline_def, types
    from PIL import Image

    image = samples.pixels(1, 24)[0]
    Image.fromarray(image).save(tmp_path / "image.png")

    @pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def pipeline():
        encoded, _ = fn.readers.file(files=[str(tmp_path / "image.png")] * 2, labels=[0, 1])
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)

    pipe = pipeline()
    pipe.build()
    (out,) = pipe.run()
    assert (np.asarray(out.at(1)) == image).all()


def test_decord_reads_a_clip(need, tmp_path):
    need("decord")
    import av
    import decord

    path = str(tmp_path / "clip.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for level in range(20, 220, 20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reader = decord.VideoReader(path, num_threads=1)
    frames = reader.get_batch([0, 4, 9]).asnumpy()
    assert len(reader) == 10 and frames.shape == (3, 64, 64, 3)
    assert np.abs(frames.mean(axis=(1, 2, 3)) - [20, 100, 200]).max() < 4


KERNEL = """
import torch, triton, triton.language as tl

@triton.jit
def double(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)

x = torch.arange(10.0)
out = torch.empty(10)
double[(2,)](x, out, 10, BLOCK=8)
assert torch.equal(out, 2 * x)
print("interpreted")
"""

COMPILED = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def double(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)

signature = {"x": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"}
made = triton.compile(ASTSource(double, signature, constexprs={"BLOCK": 128}), target=GPUTarget("cuda", 90, 32))
assert ".target sm_90" in made.asm["ptx"] and len(made.asm["cubin"]) > 0
print("compiled")
"""


@pytest.mark.parametrize(("code", "interpret", "said"), [(KERNEL, "1", "interpreted"), (COMPILED, "0", "compiled")])
def test_triton_runs_and_compiles_without_a_gpu(need, tmp_path, code, interpret, said):
    need("triton")
    (tmp_path / "kernel.py").write_text(code)
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    out = subprocess.run(
        [sys.executable, str(tmp_path / "kernel.py")], env=environment, capture_output=True, text=True, timeout=200
    )
    assert out.stdout.strip() == said, out.stderr


def test_a_required_part_that_is_missing_fails(tmp_path):
    """FASTTRAIN_REQUIRE=apex on a machine without it: the test fails instead of being skipped."""
    from fasttrain.doctor import available

    if available("apex")[0]:
        pytest.skip("apex is here")
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_it.py").write_text("def test_it(need):\n    need('apex')\n")
    root = os.path.dirname(os.path.dirname(__file__))
    for required, outcome in (("", "1 skipped"), ("apex", "1 failed")):
        out = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-c",
                "/dev/null",
                "--rootdir",
                str(tmp_path),
                str(tmp_path),
            ],
            env={**os.environ, "FASTTRAIN_REQUIRE": required, "PYTHONPATH": root},
            capture_output=True,
            text=True,
        )
        assert outcome in out.stdout, out.stdout + out.stderr
