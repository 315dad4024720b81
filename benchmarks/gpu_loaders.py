"""Rows of the suite ``loaders`` that decode on a GPU: DALI's decoder alone, torchvision's nvJPEG, two loaders at once.

All take the device from their task, so that what they do can be tried on a CPU.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from queue import Queue
from typing import Any

import numpy as np
import torch
from fasttrain.loaders import Batch, LoaderSpec, open_loader
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from .peers import AREA, ASPECT, Peer, Task


class DecodeOnly(Peer):
    """DALI's decoder of whole images, from memory to pixels on the device, and nothing else: no crop, no batch of one shape.

    What a loader that decodes whole images with it can reach at best.
    """

    AHEAD = 3  # batches

    def __init__(self, task: Task, share: float) -> None:
        from nvidia.dali import Pipeline, fn, types

        if task.packed.raw_N.any():
            raise ValueError("the packed file holds pixels, not JPEGs")
        cuda = task.device.type == "cuda"
        self.task = task
        self.pipe: Any = Pipeline(
            batch_size=task.batch, num_threads=task.workers, device_id=0 if cuda else None, prefetch_queue_depth=1
        )
        with self.pipe:
            content = fn.external_source(name="content", dtype=types.DALIDataType.UINT8, ndim=1, no_copy=True)
            how: dict[str, Any] = {"device": "mixed", "hw_decoder_load": share, "affine": False} if cuda else {}
            self.pipe.set_outputs(fn.decoders.image(content, **how))
        self.pipe.build()

    def __iter__(self) -> Iterator[range]:
        task, pending = self.task, deque[list[np.ndarray]]()  # kept until they are decoded: they are not copied
        order = np.random.default_rng().permutation(np.tile(np.arange(len(task.packed.file)), task.times))
        for first in range(0, len(order), task.batch):
            pending.append([task.packed.encoded(i) for i in order[first : first + task.batch].tolist()])
            self.pipe.feed_input("content", pending[-1])
            self.pipe.schedule_run()
            if len(pending) > self.AHEAD:
                yield self._taken(pending.popleft())
        while pending:
            yield self._taken(pending.popleft())

    def _taken(self, content: list[np.ndarray]) -> range:
        self.pipe.share_outputs()
        self.pipe.release_outputs()
        return range(len(content))

    def close(self) -> None:
        self.pipe = None


class TorchvisionGpu(Peer):
    """torchvision's ``decode_jpeg`` of whole batches (nvJPEG on a GPU), then a crop and a resize of each image there."""

    def __init__(self, task: Task) -> None:
        if task.packed.raw_N.any():
            raise ValueError("the packed file holds pixels, not JPEGs")
        self.task = task
        self.cut = v2.Compose(
            [v2.RandomResizedCrop(task.size, scale=AREA, ratio=ASPECT, antialias=True), v2.RandomHorizontalFlip()]
        )

    def __iter__(self) -> Iterator[Tensor]:
        task = self.task
        order = list(range(len(task.packed.file))) * task.times
        random.shuffle(order)
        for first in range(0, len(order), task.batch):
            content = [torch.from_numpy(task.packed.encoded(i).copy()) for i in order[first : first + task.batch]]
            images: Any = decode_jpeg(content, mode=ImageReadMode.RGB, device=task.device)
            yield torch.stack([self.cut(image) for image in images])


class Hybrid(Peer):
    """Two loaders of ours at once, each in a thread and with its share of the epoch: one decodes on the CPU, one on the GPU.

    The share is tuned before anything is timed: each side's speed while the other is at work gives the next share, twice over.

    Attributes:
        share: the first one's part of the samples.
    """

    TUNING = 2

    def __init__(self, task: Task, spec: LoaderSpec, first: str = "ffcv", second: str = "dali") -> None:
        self.spec = spec
        self.sides = [open_loader(name, spec, task.device, task.workers) for name in (first, second)]
        self.share = 0.5
        self.epoch = 0
        try:
            for _ in range(self.TUNING):
                for _ in self:
                    pass
                speeds = [len(part) / max(seconds, 1e-9) for part, seconds in zip(self.parts, self.took, strict=True)]
                self.share = min(max(speeds[0] / sum(speeds), 0.02), 0.98)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Batch]:
        index_N = self.spec.index_N
        shuffled = np.random.default_rng(self.epoch).permutation(index_N)
        at = min(max(round(self.share * len(index_N)), 1), len(index_N) - 1)
        self.parts, self.took = (shuffled[:at], shuffled[at:]), [0.0, 0.0]
        queue: Queue[Batch | BaseException | None] = Queue(4)
        threads = [threading.Thread(target=self._serve, args=(side, queue), daemon=True) for side in (0, 1)]
        for thread in threads:
            thread.start()
        left, failed = len(threads), None
        while left:
            got = queue.get()
            if isinstance(got, Batch):
                yield got
            else:
                left, failed = left - 1, got or failed
        self.epoch += 1
        if failed:
            raise failed

    def _serve(self, side: int, queue: "Queue[Batch | BaseException | None]") -> None:
        loader, start = self.sides[side], time.perf_counter()
        loader.spec = replace(self.spec, index_N=self.parts[side])
        loader.set_epoch(self.epoch)
        try:
            for batch in loader:
                self.took[side] = time.perf_counter() - start  # not how long the last one waited to be taken
                queue.put(batch)
            queue.put(None)
        except BaseException as error:  # raised where the batches are used
            queue.put(error)

    def close(self) -> None:
        for loader in self.sides:
            loader.close()
