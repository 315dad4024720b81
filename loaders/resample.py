"""Cuts views out of images: crop, antialiased resize and flip of a whole batch, exact on every device.

The resize is the usual separable triangle filter (bilinear, widened when it shrinks, as in Pillow), with its weights
rounded to multiples of 1/1024 that sum to 1. Every product and sum is then an integer below 2**18, which float32 (and
even TF32) holds exactly: the same view gives the same bytes on a CPU and on a GPU, alone and in a batch. Against
Pillow, whose weights have more bits, single pixels differ by 2 of 255 at most (tests/loaders/test_resample.py).

Shape suffixes: B batch, H W stored height and width, S output side, C channels (3), N images.
"""

import numpy as np
import torch
from torch import Tensor

from .views import View

_ONE = 1024  # a weight of 1, as an integer


def cut(image_BHWC: Tensor, view: View, size: int) -> Tensor:
    """The views of a batch of images of one size.

    Args:
        image_BHWC: uint8, contiguous, on any device.
        view: a box and flips for each image; what lies outside the image is black.
        size: side of the result, in pixels.

    Returns:
        uint8 [B, C, S, S], channels_last.
    """
    if (view.box_B4[:, 2:] == size).all():
        return _gather(image_BHWC, np.arange(len(view)), view, size)
    height, width = image_BHWC.shape[1:3]
    device = image_BHWC.device
    weight_BSH = _sent(_weights(view.box_B4[:, 0], view.box_B4[:, 2], height, size, view.flip_B2[:, 1]), device)
    weight_BSW = _sent(_weights(view.box_B4[:, 1], view.box_B4[:, 3], width, size, view.flip_B2[:, 0]), device)
    channels = image_BHWC.shape[3]
    row_BSX = weight_BSH @ image_BHWC.flatten(2).float()
    row_BSWC = _round(row_BSX).unflatten(2, (width, channels))
    out_BSSC = _round(weight_BSW[:, None] @ row_BSWC)
    return out_BSSC.to(torch.uint8).permute(0, 3, 1, 2)


def cut_from_store(store_NHWC: Tensor, index_B: np.ndarray, view: View, size: int) -> Tensor:
    """The views of the images ``index_B`` of a store, without a copy of the whole images where the box is not resized.

    Same result as ``cut(store_NHWC[index_B], view, size)``.
    """
    if (view.box_B4[:, 2:] == size).all():
        return _gather(store_NHWC, index_B, view, size)
    return cut(store_NHWC[_sent(index_B, store_NHWC.device)], view, size)


def _round(sum_: Tensor) -> Tensor:
    """Sums of weight x pixel back to whole pixel values, still as float32."""
    return (sum_ * (1.0 / _ONE) + 0.5).floor_()


def _weights(start_B: np.ndarray, length_B: np.ndarray, extent: int, size: int, flip_B: np.ndarray) -> np.ndarray:
    """Triangle-filter weights in 1/1024: float32 [B, S, extent]; a row sums to 1024, less what lies outside the image.

    Output pixel s of a box (start, length) has its centre at ``start + (s + 1/2) * length / S`` and the support
    ``max(length / S, 1)`` to both sides.
    """
    scale_B = length_B / size
    support_B = np.maximum(scale_B, 1.0)
    centre_BS = start_B[:, None] + (np.arange(size)[None] + 0.5) * scale_B[:, None]
    centre_BS = np.where(flip_B[:, None], centre_BS[:, ::-1], centre_BS)
    first_BS = np.floor(centre_BS - support_B[:, None]).astype(np.int64)
    taps = int(np.ceil(2 * support_B.max())) + 2
    position_BST = first_BS[..., None] + np.arange(taps)
    weight_BST = 1 - np.abs(position_BST + 0.5 - centre_BS[..., None]) / support_B[:, None, None]
    # the filter ends at the box, as if it had been cropped first
    inside_BST = (position_BST >= start_B[:, None, None]) & (position_BST < (start_B + length_B)[:, None, None])
    weight_BST = np.where(inside_BST, np.maximum(weight_BST, 0), 0)
    whole_BST = np.round(weight_BST * (_ONE / weight_BST.sum(-1, keepdims=True)))
    largest_BS = whole_BST.argmax(-1)[..., None]
    rest_BS = _ONE - whole_BST.sum(-1, keepdims=True)
    np.put_along_axis(whole_BST, largest_BS, np.take_along_axis(whole_BST, largest_BS, -1) + rest_BS, -1)
    whole_BST[(position_BST < 0) | (position_BST >= extent)] = 0
    out_BSX = np.zeros((*centre_BS.shape, extent), dtype=np.float32)
    b, s, _ = np.ogrid[: len(start_B), :size, :taps]
    np.add.at(out_BSX, (b, s, position_BST.clip(0, extent - 1)), whole_BST)
    return out_BSX


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    """On the device; the host does not wait, as it would for pageable memory."""
    out = torch.from_numpy(values)
    return out.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else out


def _gather(store_NHWC: Tensor, index_B: np.ndarray, view: View, size: int) -> Tensor:
    """Views whose boxes already have the output's size: one indexing operation."""
    height, width, channels = store_NHWC.shape[1:]
    top_B, left_B = view.box_B4[:, 0], view.box_B4[:, 1]
    outside = (top_B < 0) | (left_B < 0) | (top_B + size > height) | (left_B + size > width)
    on_host = store_NHWC.device.type == "cpu"
    flat_BSS, inside_BSS = (_places if on_host else _places_there)(store_NHWC, index_B, view, size)
    out_BSSC = store_NHWC.view(-1, channels).index_select(0, flat_BSS.flatten()).view(*flat_BSS.shape, channels)
    if outside.any():
        out_BSSC.mul_(inside_BSS[..., None])
    return out_BSSC.permute(0, 3, 1, 2)


def _places(store_NHWC: Tensor, index_B: np.ndarray, view: View, size: int) -> tuple[Tensor, Tensor]:
    """Which pixel of the store each pixel of the views is, counted over all images: int64 [B, S, S]; and whether it lies in
    its image: bool."""
    height, width = store_NHWC.shape[1:3]
    step_S = np.arange(size)
    y_BS = view.box_B4[:, :1] + np.where(view.flip_B2[:, 1:], step_S[::-1], step_S)
    x_BS = view.box_B4[:, 1:2] + np.where(view.flip_B2[:, :1], step_S[::-1], step_S)
    inside_BSS = ((y_BS >= 0) & (y_BS < height))[:, :, None] & ((x_BS >= 0) & (x_BS < width))[:, None, :]
    row_BSS = (index_B[:, None, None] * height + y_BS.clip(0, height - 1)[:, :, None]) * width
    return torch.from_numpy(row_BSS + x_BS.clip(0, width - 1)[:, None, :]), torch.from_numpy(inside_BSS)


def _places_there(store_NHWC: Tensor, index_B: np.ndarray, view: View, size: int) -> tuple[Tensor, Tensor]:
    """The same, computed where the store is: five numbers of each view travel there, not one of each pixel."""
    height, width = store_NHWC.shape[1:3]
    down_B2 = view.flip_B2[:, ::-1].astype(np.int64)
    five_B5 = np.concatenate([index_B[:, None], view.box_B4[:, :2], down_B2], axis=1)
    index_B1, top_B1, left_B1, upside_B1, mirrored_B1 = _sent(five_B5, store_NHWC.device).split(1, dim=1)
    step_S = torch.arange(size, device=store_NHWC.device)
    turned_S = size - 1 - 2 * step_S
    y_BS, x_BS = top_B1 + step_S + upside_B1 * turned_S, left_B1 + step_S + mirrored_B1 * turned_S
    inside_BSS = ((y_BS >= 0) & (y_BS < height))[:, :, None] & ((x_BS >= 0) & (x_BS < width))[:, None, :]
    row_BS = (index_B1 * height + y_BS.clamp(0, height - 1)) * width
    return row_BS[:, :, None] + x_BS.clamp(0, width - 1)[:, None, :], inside_BSS
