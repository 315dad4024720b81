"""The Triton kernel of a network's input, and its operator; see pixels.py.

Shape suffix: E elements of a block, in the output's order (row, column, channel).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tracing import launcher, on_device_of, operator

BLOCK, WARPS = 1024, 4


@triton.jit
def pixels_kernel(
    pixels, mean, std, out, height, width, stride_b, stride_c, stride_y, stride_x,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, RESIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of an image's elements, images)."""
    e_E = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    inside_E = e_E < OUT_H * OUT_W * 3
    c_E, x_E, y_E = e_E % 3, (e_E // 3) % OUT_W, e_E // (3 * OUT_W)
    pixels_E = pixels + image * stride_b + c_E * stride_c
    if RESIZE:
        # the centre of an output pixel in the input, as interpolate(align_corners=False) has it
        at_y_E = tl.maximum((y_E.to(tl.float32) + 0.5) * (height / OUT_H) - 0.5, 0.0)
        at_x_E = tl.maximum((x_E.to(tl.float32) + 0.5) * (width / OUT_W) - 0.5, 0.0)
        top_E, left_E = at_y_E.to(tl.int32), at_x_E.to(tl.int32)
        down_E, right_E = at_y_E - top_E, at_x_E - left_E
        low_E, far_E = tl.minimum(top_E + 1, height - 1), tl.minimum(left_E + 1, width - 1)
        a_E = tl.load(pixels_E + top_E * stride_y + left_E * stride_x, mask=inside_E, other=0).to(tl.float32)
        b_E = tl.load(pixels_E + top_E * stride_y + far_E * stride_x, mask=inside_E, other=0).to(tl.float32)
        c00_E = tl.load(pixels_E + low_E * stride_y + left_E * stride_x, mask=inside_E, other=0).to(tl.float32)
        d_E = tl.load(pixels_E + low_E * stride_y + far_E * stride_x, mask=inside_E, other=0).to(tl.float32)
        upper_E = a_E + right_E * (b_E - a_E)
        lower_E = c00_E + right_E * (d_E - c00_E)
        value_E = upper_E + down_E * (lower_E - upper_E)
    else:
        value_E = tl.load(pixels_E + y_E * stride_y + x_E * stride_x, mask=inside_E, other=0).to(tl.float32)
    value_E = (value_E - tl.load(mean + c_E)) / tl.load(std + c_E)
    tl.store(out + image * (OUT_H * OUT_W * 3) + e_E, value_E.to(out.dtype.element_ty), mask=inside_E)


def _network_input(pixels: Tensor, mean: Tensor, std: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    batch, channels, height, width = pixels.shape
    out_h, out_w = (size, size) if size else (height, width)
    out = torch.empty(
        (batch, channels, out_h, out_w), dtype=dtype, device=pixels.device, memory_format=torch.channels_last
    )
    blocks = (out_h * out_w * 3 + BLOCK - 1) // BLOCK
    with on_device_of(pixels):
        launcher(pixels_kernel)[(blocks, batch)](
            pixels, mean, std, out, height, width, *pixels.stride(), OUT_H=out_h, OUT_W=out_w,
            RESIZE=(out_h, out_w) != (height, width), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


def _fake(pixels: Tensor, mean: Tensor, std: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    shape = (*pixels.shape[:2], size or pixels.shape[2], size or pixels.shape[3])
    return torch.empty(shape, dtype=dtype, device=pixels.device, memory_format=torch.channels_last)


network_input_op = operator("fasttrain::network_input", _network_input, _fake)
