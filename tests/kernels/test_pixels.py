"""A network's input against float64, plain and by the Triton kernel."""

import numpy as np
import pytest
import torch
from fasttrain.kernels import network_input
from torch.utils._python_dispatch import TorchDispatchMode

from .test_soft_target import DEVICE

MEAN, STD = torch.tensor([123.7, 116.3, 103.5]), torch.tensor([58.4, 57.1, 57.4])
HALF_STEP = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def bilinear(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Enlarged by the definition: centres of pixels, two neighbours each way, in float64."""
    for axis in (0, 1):
        extent = image_HWC.shape[axis]
        at = np.maximum((np.arange(size) + 0.5) * extent / size - 0.5, 0)
        low = at.astype(int)
        share = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        near, far = image_HWC.take(low, axis), image_HWC.take(np.minimum(low + 1, extent - 1), axis)
        image_HWC = near * (1 - share) + far * share
    return image_HWC


@pytest.mark.parametrize("implementation", ["plain", "triton"])
@pytest.mark.parametrize("dtype", HALF_STEP)
@pytest.mark.parametrize(("height", "width", "size"), [(12, 12, 0), (9, 14, 0), (12, 12, 24), (7, 10, 23), (5, 5, 5)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_values(implementation, dtype, height, width, size, layout, need):
    if implementation == "triton":
        need("triton")
    pixels = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8).contiguous(memory_format=layout)
    given = [x.to(DEVICE) for x in (pixels, MEAN, STD)]
    out = network_input(*given, size=size, dtype=dtype, implementation=implementation)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert out.shape == (3, 3, size or height, size or width)
    for image, result in zip(pixels.permute(0, 2, 3, 1).double().numpy(), out.permute(0, 2, 3, 1), strict=True):
        image = bilinear(image, size) if size else image
        expected = (image - MEAN.double().numpy()) / STD.double().numpy()
        # float32 keeps 6 digits of a pixel value of up to 255; the interpreter cuts off to bfloat16 where a GPU rounds
        relative = HALF_STEP[dtype] * (2 if implementation == "triton" and DEVICE == "cpu" else 1)
        assert (np.abs(result.double().cpu().numpy() - expected) <= 5e-6 + relative * np.abs(expected)).all()


def test_shrinking_is_antialiased():
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    pixels[:, :, ::2] = 200
    out = network_input(pixels, torch.zeros(3), torch.ones(3), size=2)
    assert (out - 100).abs().max() < 15
    with pytest.raises(ValueError, match="does not shrink: 8 x 8 to 2"):
        network_input(pixels, MEAN, STD, size=2, implementation="triton")


def test_the_operator(need):
    need("triton")
    from fasttrain.kernels.pixels_kernel import network_input_op

    pixels = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8, device=DEVICE)
    for size in (0, 13):
        torch.library.opcheck(network_input_op, (pixels, MEAN.to(DEVICE), STD.to(DEVICE), size, torch.bfloat16))
    torch._dynamo.reset()
    compiled = torch.compile(network_input, fullgraph=True, backend="aot_eager")
    options = {"size": 13, "implementation": "triton"}
    given = (pixels, MEAN.to(DEVICE), STD.to(DEVICE))
    assert torch.equal(compiled(*given, **options), network_input(*given, **options))


@pytest.mark.parametrize("implementation", ["plain", "triton"])
@pytest.mark.parametrize("size", [0, 11])
@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_clips_are_their_frames(implementation, size, layout, need):
    if implementation == "triton":
        need("triton")
    clips = torch.randint(0, 256, (2, 3, 4, 7, 9), dtype=torch.uint8).contiguous(memory_format=layout)
    rest = (MEAN.to(DEVICE), STD.to(DEVICE))
    how = {"size": size, "dtype": torch.bfloat16, "implementation": implementation}
    out = network_input(clips.to(DEVICE), *rest, **how)
    assert out.shape == (2, 3, 4, size or 7, size or 9) and out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    for t in range(4):
        assert torch.equal(out[:, :, t], network_input(clips[:, :, t].to(DEVICE), *rest, **how))


def test_channels_last_clips_are_not_copied():
    """Their frames are a view of the bytes that the loader gave; those of another layout are copied, as bytes."""

    class Bytes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.uint8:
                places.add(out.untyped_storage().data_ptr())
            return out

    for layout, count in ((torch.channels_last_3d, 1), (torch.contiguous_format, 2)):
        clips = torch.zeros(2, 3, 4, 6, 6, dtype=torch.uint8).contiguous(memory_format=layout)
        places = {clips.untyped_storage().data_ptr()}
        with Bytes():
            network_input(clips, MEAN, STD)
        assert len(places) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": torch.zeros(2, 3, 4, 4)}, "uint8 [B, 3, H, W] or [B, 3, T, H, W], not torch.float32 [2, 3, 4, 4]"),
        ({"pixels": torch.zeros(2, 4, 4, 3, dtype=torch.uint8)}, "not torch.uint8 [2, 4, 4, 3]"),
        ({"pixels": torch.zeros(2, 8, 3, 4, 4, dtype=torch.uint8)}, "not torch.uint8 [2, 8, 3, 4, 4]"),
        ({"mean": torch.zeros(1)}, "mean and std must be [3], not [1] and [3]"),
        ({"implementation": "cuda"}, "implementation is one of auto, plain, triton, not 'cuda'"),
    ],
)
def test_mistakes(changes, message):
    arguments = {"pixels": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "mean": MEAN, "std": STD}
    with pytest.raises(ValueError) as error:
        network_input(**(arguments | changes))
    assert message in str(error.value)
