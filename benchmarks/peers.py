"""Loaders that are not ours, as their users write them: rows of the suite ``loaders``.

A peer is opened with a :class:`Task` and goes through one epoch in a new random order whenever it is iterated, yielding
things that have as many images as their ``len`` says. All take a random-resized crop (8 to 100 % of the area, aspect
ratio 3/4 to 4/3) to ``size`` pixels and mirror half of the images; pixels stay uint8.
"""

import ctypes
import math
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fasttrain.loaders.dali_loader import gpu_decodes_crops
from fasttrain.loaders.datasets.beton import Packed
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Task:
    """What to load.

    Attributes:
        folder: class folders of image files; None where there is only a packed file.
        packed: the same images in a ``.beton``.
        size: side in pixels of the images delivered.
        batch: images a batch.
        workers: threads or processes.
        device: where batches shall be.
        times: how often an epoch has each image: few images would be an epoch of a few batches.
    """

    folder: Path | None
    packed: Packed
    size: int
    batch: int
    workers: int
    device: torch.device
    times: int = 1

    @property
    def files(self) -> Path:
        """The folder.

        Raises:
            ValueError: there is none.
        """
        if self.folder is None:
            raise ValueError("it reads a folder of image files; --data names a packed file")
        return self.folder


class Peer:
    """Something that can be iterated, epoch after epoch."""

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    def close(self) -> None:
        """Ends its threads and processes."""


class TorchData(Peer):
    """PyTorch's DataLoader with torchvision's transforms, on tensors or on PIL images."""

    def __init__(self, task: Task, *, pil: bool) -> None:
        cut = [v2.RandomResizedCrop(task.size, scale=AREA, ratio=ASPECT, antialias=True), v2.RandomHorizontalFlip()]
        if pil:
            dataset = ImageFolder(task.files, transform=v2.Compose([*cut, v2.PILToTensor()]))
        else:
            dataset = ImageFolder(task.files, transform=v2.Compose(cut), loader=_decoded)
        dataset.samples *= task.times
        self.device = task.device
        self.loader = DataLoader(
            dataset,
            batch_size=task.batch,
            shuffle=True,
            num_workers=task.workers,  # PyTorch gives each of them one thread
            persistent_workers=True,
            prefetch_factor=4,
            pin_memory=task.device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Tensor]:
        for pixels, targets in self.loader:
            targets.to(self.device, non_blocking=True)
            yield pixels.to(self.device, non_blocking=True)

    def close(self) -> None:
        iterator: Any = self.loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()


def _decoded(path: str) -> Tensor:
    return decode_image(path, mode=ImageReadMode.RGB)


class PlainFfcv(Peer):
    """FFCV's loader, decoder and transforms, as its ImageNet example has them."""

    def __init__(self, task: Task) -> None:
        from fasttrain.loaders.ffcv_decoder import leave_numba_types_alone
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToDevice, ToTensor, ToTorchImage

        leave_numba_types_alone()  # the other rows of this process are compiled, too
        file = task.packed.file
        move = [ToDevice(task.device, non_blocking=True)] if task.device.type == "cuda" else []
        image = [RandomResizedCropRGBImageDecoder((task.size, task.size), AREA, ASPECT), RandomHorizontalFlip()]
        label = next(name for name in file.fields if name != file.image_field)
        self.loader = Loader(
            str(file.path),
            batch_size=task.batch,
            num_workers=task.workers,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=False,
            indices=np.tile(np.arange(len(file)), task.times),
            pipelines={
                file.image_field: [*image, ToTensor(), *move, ToTorchImage()],
                label: [IntDecoder(), ToTensor(), Squeeze(), *move],
            },
        )

    def __iter__(self) -> Iterator[Tensor]:
        for pixels, _ in self.loader:
            yield pixels


class PlainDali(Peer):
    """DALI's pipeline for classification, as its documentation has it, decoding on the CPU or (``mixed``) on the GPU.

    On a GPU whole images are decoded and then cut where the nvImageCodec that is here fails at decoding a part of one.

    Batches are scheduled by hand instead of by DALI's iterator, which decodes two of the next epoch when one has ended:
    they would count for nothing here, and disturb what is timed next. All batches are full; the last one is filled up
    from the next epoch.
    """

    AHEAD = 2  # DALI's default

    def __init__(self, task: Task, *, mixed: bool = False) -> None:
        from nvidia.dali import fn, pipeline_def, types

        cuda = task.device.type == "cuda"
        gpu: Any = 0 if cuda else None
        tree = ImageFolder(task.files)
        paths, labels_N = (list(column) * task.times for column in zip(*tree.samples, strict=True))
        box: dict[str, Any] = {"random_aspect_ratio": ASPECT, "random_area": AREA, "num_attempts": 10}

        @pipeline_def(batch_size=task.batch, num_threads=task.workers, device_id=gpu, prefetch_queue_depth=self.AHEAD)
        def pipeline():
            jpegs, labels = fn.readers.file(files=paths, labels=labels_N, random_shuffle=True, name="Reader")
            images: Any
            triangle = types.DALIInterpType.INTERP_TRIANGULAR
            side: dict[str, Any] = {"interp_type": triangle, "size": (task.size, task.size)}
            if mixed and not gpu_decodes_crops():
                images = fn.random_resized_crop(fn.decoders.image(jpegs, device="mixed"), **side, **box)
            else:
                images = fn.decoders.image_random_crop(jpegs, device="mixed" if mixed else "cpu", **box)
                images = fn.resize(images, **side)
            images = fn.flip(images, horizontal=fn.random.coin_flip(probability=0.5))
            return (images if mixed else images.gpu(), labels.gpu()) if cuda else (images, labels)

        self.pipe: Any = pipeline()
        self.pipe.build()
        self.batches = max(math.ceil(self.pipe.epoch_size("Reader") / task.batch), self.AHEAD)
        self.filled = False

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.AHEAD if self.filled else 1):  # the first call of all fills the queue
            self.pipe.schedule_run()
        self.filled = True
        for i in range(self.batches):
            pixels, _ = (torch.from_dlpack(out.as_tensor()) for out in self.pipe.share_outputs())
            self.pipe.release_outputs()
            if i + self.AHEAD < self.batches:
                self.pipe.schedule_run()
            yield pixels.permute(0, 3, 1, 2)

    def close(self) -> None:
        self.pipe = None


class Spdl(Peer):
    """SPDL's DataLoader, as its documentation has it for images: FFmpeg decodes, crops, resizes and flips in threads.

    The documentation resizes whole images; here each has its own crop, as FFmpeg's filter: in planes of Y, Cb and Cr
    before they become RGB, so that a crop of 4:2:0 begins at even pixels.
    """

    def __init__(self, task: Task) -> None:
        import spdl.io
        import spdl.io.utils
        from spdl.dataloader import DataLoader as SpdlLoader

        spdl.io.utils.get_ffmpeg_versions()  # looks for FFmpeg's libraries
        size = task.size

        def decode(path: str):
            packets = spdl.io.demux_image(path)
            top, left, height, width = _box(packets.height, packets.width)
            steps = [f"crop=w={width}:h={height}:x={left}:y={top}", f"scale=w={size}:h={size}:flags=bilinear"]
            steps += ["hflip"] if random.random() < 0.5 else []
            return spdl.io.decode_packets(packets, filter_desc=",".join([*steps, "format=pix_fmts=rgb24"]))

        def batch(frames: list):
            return spdl.io.to_torch(spdl.io.convert_frames(frames)).permute(0, 3, 1, 2)

        self.device = task.device
        self.paths = [path for path, _ in ImageFolder(task.files).samples] * task.times
        self.loader: Any = SpdlLoader(
            _Shuffled(self.paths),
            preprocessor=decode,
            batch_size=task.batch,
            aggregator=batch,
            num_threads=task.workers,
        )

    def __iter__(self) -> Iterator[Tensor]:
        for pixels in self.loader:
            yield pixels.to(self.device, non_blocking=True)


class _Shuffled:
    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[str]:
        return iter(random.sample(self.paths, len(self.paths)))


def _box(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random-resized crop, as torchvision draws it."""
    for _ in range(10):
        area = height * width * random.uniform(*AREA)
        aspect = math.exp(random.uniform(*map(math.log, ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    h, w = min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))
    return (height - h) // 2, (width - w) // 2, h, w


class BareDecode(Peer):
    """libjpeg-turbo's decoder of the whole JPEG to RGB and nothing else, each thread with its own buffer.

    What a loader that decodes whole images can reach at best.
    """

    CHUNK = 16  # images that a thread takes at once

    def __init__(self, task: Task) -> None:
        if task.packed.raw_N.any():
            raise ValueError("the packed file holds pixels, not JPEGs")
        self.turbo = ctypes.CDLL("libturbojpeg.so.0")
        self.turbo.tjInitDecompress.restype = ctypes.c_void_p
        self.turbo.tjDestroy.argtypes = [ctypes.c_void_p]
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self.turbo.tjDecompress2.argtypes = [pointer, pointer, ctypes.c_ulong, pointer, *[number] * 5]
        file = task.packed.file
        self.place_N = (task.packed.data.ctypes.data + file.ptr_N).tolist()
        self.size_N, self.height_N, self.width_N = (a.tolist() for a in (file.size_N, file.height_N, file.width_N))
        self.packed, self.largest = task.packed, int((file.height_N * file.width_N).max()) * 3
        self.times = task.times
        self.own = threading.local()
        self.handles: list[int] = []
        self.pool = ThreadPoolExecutor(task.workers, initializer=self._begin)

    def _begin(self) -> None:
        self.own.handle = self.turbo.tjInitDecompress()
        self.own.buffer = np.empty(self.largest, dtype=np.uint8)
        self.handles.append(self.own.handle)

    def _decode(self, chunk: list[int]) -> list[int]:
        handle, buffer, decompress = self.own.handle, self.own.buffer.ctypes.data, self.turbo.tjDecompress2
        for i in chunk:
            decompress(handle, self.place_N[i], self.size_N[i], buffer, self.width_N[i], 0, self.height_N[i], 0, 0)
        return chunk

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.place_N))) * self.times
        random.shuffle(order)
        yield from self.pool.map(self._decode, [order[i : i + self.CHUNK] for i in range(0, len(order), self.CHUNK)])

    def close(self) -> None:
        self.pool.shutdown()
        while self.handles:
            self.turbo.tjDestroy(self.handles.pop())
