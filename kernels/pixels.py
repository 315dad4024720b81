"""A network's input, images or clips: uint8 pixels -> resized, normalised floats, channels_last.

The plain form is what runs. The Triton kernel does the same in one pass, from bytes to the finished floats, but has not
been measured against torch.compile's version of the plain form on a GPU yet (``fasttrain bench kernels`` does): ``auto``
does not choose what has not been seen to be faster.

Shape suffixes: B batch, C channels (3), T frames, H W height and width, S output side, N frames of all clips (B * T).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IMPLEMENTATIONS = ("auto", "plain", "triton")


def network_input(
    pixels: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    size: int = 0,
    dtype: torch.dtype = torch.float32,
    implementation: str = "auto",
) -> Tensor:
    """``(pixel - mean) / std``, after a bilinear resize to a square if ``size`` is given.

    Computed in float32. Enlarging is PyTorch's ``interpolate(mode="bilinear")``; shrinking is antialiased.

    Args:
        pixels: uint8 [B, 3, H, W], any memory format, or clips [B, 3, T, H, W], whose frames are treated one by one
            (without a copy where memory is [B, T, H, W, 3], channels_last_3d).
        mean: float32 [3], in the units of the pixels (0 .. 255).
        std: likewise.
        size: side of the output in pixels; 0 keeps the input's.
        dtype: of the output.
        implementation: ``plain``, ``triton`` (which does not shrink), or ``auto``: plain.

    Returns:
        [B, 3, S, S] (or [B, 3, H, W]), channels_last; of clips [B, 3, T, S, S], channels_last_3d.

    Raises:
        ValueError: not uint8 with 3 channels, statistics of another shape, or an implementation that cannot do it.
    """
    if pixels.dim() not in (4, 5) or pixels.shape[1] != 3 or pixels.dtype != torch.uint8:
        raise ValueError(
            f"pixels must be uint8 [B, 3, H, W] or [B, 3, T, H, W], not {pixels.dtype} {list(pixels.shape)}"
        )
    if mean.shape != (3,) or std.shape != (3,):
        raise ValueError(f"mean and std must be [3], not {list(mean.shape)} and {list(std.shape)}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}")
    if pixels.dim() == 4:
        return _images(pixels, mean, std, size, dtype, implementation)
    frame_NCHW = pixels.transpose(1, 2).flatten(0, 1)
    frame_NCHW = _images(frame_NCHW, mean, std, size, dtype, implementation)
    return frame_NCHW.unflatten(0, (pixels.shape[0], pixels.shape[2])).transpose(1, 2)


def _images(
    pixel_BCHW: Tensor, mean: Tensor, std: Tensor, size: int, dtype: torch.dtype, implementation: str
) -> Tensor:
    if implementation == "triton":
        height, width = pixel_BCHW.shape[2:]
        if size and (size < height or size < width):
            raise ValueError(f"the triton kernel does not shrink: {height} x {width} to {size}")
        from .pixels_kernel import network_input_op  # imports triton

        return network_input_op(pixel_BCHW, mean, std, size, dtype)
    x_BCHW = (_resized(pixel_BCHW.float(), size) - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    return x_BCHW.to(dtype).contiguous(memory_format=torch.channels_last)


def _resized(x_BCHW: Tensor, size: int) -> Tensor:
    height, width = x_BCHW.shape[2:]
    if not size or (height, width) == (size, size):
        return x_BCHW
    # antialiasing changes nothing where an image is enlarged, and PyTorch's code for it is the faster one on a CPU
    return F.interpolate(x_BCHW, size=(size, size), mode="bilinear", antialias=True)
