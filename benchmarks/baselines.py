"""Training steps that are not ours, as others write them: rows of the suite ``step``.

Both train a target on labels and on the soft labels of frozen sources: ``L = CE + sum_m T^2 L_aux,m``, mean over the batch
(Eq. 5 to 7 of the SSKT paper, alpha = 1), by SGD with momentum. Images are in memory, as CIFAR's and STL-10's are; a
training view is a window of the images' size, shifted by up to 4 pixels over a black border, mirrored half of the time.

Shape suffixes: B batch, N images, C channels or the sources' classes side by side, c one source's classes, K the task's
classes, H W height and width.
"""

import os
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for pixels of 0 to 1
PAD = 4
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # the published code's, on STL-10


class Baseline:
    """A training loop that can be run for some steps at a time.

    It makes ``target`` and ``sources`` its own: moves them, changes their layout and mode, trains the target. They may
    not be used elsewhere. Random numbers are PyTorch's global ones.

    Args:
        images_NHWC: uint8 [N, S, S, 3].
        labels_N: whole numbers [N].
        target: ``target(pixel_BCHW, aux=True)`` gives a :class:`fasttrain.models.target.TargetOutput`, with auxiliary logits
            of all sources side by side, in their order.
        sources: networks from normalised pixels to logits.
        source_size: side in pixels of the sources' input; smaller images are enlarged to it, larger ones left alone.
        batch: images a step.
        device: of networks and steps.
        dtype: of the arithmetic under autocast; float32 for none.
        temperature: T, for both sides of the soft-label losses.
        lr: learning rate, constant.

    Attributes:
        losses: what was read from the device, every ``READ_EVERY`` steps.

    Raises:
        ValueError: images that are not square uint8 RGB, another number of labels, more images a batch than there are, or
            no source.
    """

    READ_EVERY: int
    CUDNN_BENCHMARK: bool
    LAYOUT: torch.memory_format

    def __init__(
        self,
        images_NHWC: np.ndarray,
        labels_N: np.ndarray,
        target: nn.Module,
        sources: list[nn.Module],
        *,
        source_size: int,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        temperature: float = 1.0,
        lr: float = 0.1,
    ) -> None:
        shape = images_NHWC.shape
        if images_NHWC.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
            raise ValueError(f"images: {images_NHWC.dtype} {list(shape)}, not uint8 [N, S, S, 3]")
        if labels_N.shape != shape[:1]:
            raise ValueError(f"labels: {list(labels_N.shape)} for {shape[0]} images")
        if not 1 <= batch <= shape[0]:
            raise ValueError(f"batch: {batch} is not between 1 and the {shape[0]} images there are")
        if not sources:
            raise ValueError("sources: there has to be one at least")
        self.device, self.dtype, self.temperature = device, dtype, temperature
        self.target: Any = target.to(device, memory_format=self.LAYOUT).train()  # type: ignore[call-overload]
        self.sources: list[Any] = [s.to(device, memory_format=self.LAYOUT) for s in sources]  # type: ignore[call-overload]
        enlarge = shape[1] < source_size
        self.enlarge = nn.Upsample(size=source_size, mode="bilinear") if enlarge else nn.Identity()
        self.optimiser = torch.optim.SGD(target.parameters(), lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.loader = self._loader(images_NHWC, labels_N, batch)
        self.epoch: Any = None  # the loader's iterator
        self.taken = 0
        self.losses: list[float] = []

    def steps(self, count: int) -> int:
        """Takes that many training steps, through as many epochs as they need, and does not wait for the GPU to end them.

        Returns:
            Images seen.
        """
        images = 0
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, self.CUDNN_BENCHMARK
        try:
            for _ in range(count):
                pixel_BCHW, label_B = self.next_batch()
                loss = self.step(pixel_BCHW, label_B)
                images += len(label_B)
                self.taken += 1
                if self.taken % self.READ_EVERY == 0:
                    self.losses.append(loss.item())
        finally:
            torch.backends.cudnn.benchmark = before
        return images

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Normalised pixels, float32 [B, 3, S, S], and labels, int64 [B], on the device."""
        raise NotImplementedError

    def step(self, pixel_BCHW: Tensor, label_B: Tensor) -> Tensor:
        """One training step on such a batch; its loss, on the device."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the loader's processes. Steps taken later begin a new epoch."""
        if self.epoch is not None:
            self.epoch._shutdown_workers()
        self.epoch = self.loader._iterator = None

    def _loader(self, images_NHWC: np.ndarray, labels_N: np.ndarray, batch: int) -> DataLoader:
        raise NotImplementedError

    def _loaded(self) -> tuple[Tensor, Tensor]:
        """The loader's next batch, where one epoch has ended that of the next."""
        loaded = next(self.epoch, None) if self.epoch is not None else None
        if loaded is None:
            self.epoch = iter(self.loader)
            loaded = next(self.epoch)
        return loaded


class PaperStyle(Baseline):
    """The step of the code that the SSKT paper's authors published.

    float32 whatever ``dtype`` is (convolutions in TF32 where PyTorch does so by itself), nothing compiled, NCHW; PIL images
    from 4 workers that every epoch starts anew; copies that are waited for; sources one after the other and in training mode:
    they normalise with the batch's statistics, and their running ones drift. Loss and accuracy are read at every step. The
    last batch of an epoch may be smaller.
    """

    READ_EVERY = 1
    CUDNN_BENCHMARK = False
    LAYOUT = torch.contiguous_format

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accuracies: list[float] = []
        for source in self.sources:
            source.train()

    def _loader(self, images_NHWC: np.ndarray, labels_N: np.ndarray, batch: int) -> DataLoader:
        to_floats = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        return DataLoader(
            _Pictures(images_NHWC, labels_N, to_floats),
            batch_size=batch,
            shuffle=True,
            num_workers=4,
            pin_memory=self.device.type == "cuda",  # published as True, which without a GPU does nothing but warn
        )

    def next_batch(self) -> tuple[Tensor, Tensor]:
        pixel_BCHW, label_B = self._loaded()
        return pixel_BCHW.to(self.device), label_B.to(self.device)

    def step(self, pixel_BCHW: Tensor, label_B: Tensor) -> Tensor:
        output, temp = self.target(pixel_BCHW, aux=True), self.temperature
        with torch.no_grad():
            enlarged_BCHW = self.enlarge(pixel_BCHW)
            soft = [source(enlarged_BCHW) for source in self.sources]
        loss = F.cross_entropy(output.logits_BK, label_B)
        for aux_Bc, soft_Bc in zip(_split(output.aux_logits_BC, soft), soft, strict=True):
            p_Bc = F.softmax(soft_Bc / temp, dim=1)
            loss = loss + temp**2 * -(p_Bc * F.log_softmax(aux_Bc / temp, dim=1)).sum(1).mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.accuracies.append((output.logits_BK.argmax(1) == label_B).float().mean().item())
        return loss.detach()


class TimmStyle(Baseline):
    """What a good trainer does that knows image networks well, and nothing of this kind of transfer.

    Autocast, channels_last, target and each source compiled; sources in eval mode, one after the other, at every step; workers
    that stay, one for each core; bytes that a side stream copies and normalises a batch ahead; the loss is read every 50 steps,
    batches are always full. The soft-label losses are PyTorch's KL divergence. As timm's training script and its loader
    (timm/data/loader.py, ``PrefetchLoader``) do.

    Args:
        compile: off for no compilation.
    """

    READ_EVERY = 50
    CUDNN_BENCHMARK = True
    LAYOUT = torch.channels_last

    def __init__(self, *args: Any, compile: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sources = [source.eval().requires_grad_(False) for source in self.sources]
        if compile:
            self.target, self.sources = torch.compile(self.target), [torch.compile(s) for s in self.sources]
        self.mean, self.std = (255 * torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # mean and std are made there
        self.ahead: tuple[Tensor, Tensor, torch.cuda.Event | None] | None = None

    def _loader(self, images_NHWC: np.ndarray, labels_N: np.ndarray, batch: int) -> DataLoader:
        return DataLoader(
            _Pictures(images_NHWC, labels_N, [transforms.PILToTensor()]),
            batch_size=batch,
            shuffle=True,
            num_workers=len(os.sched_getaffinity(0)),
            pin_memory=self.device.type == "cuda",
            drop_last=True,
            persistent_workers=True,
        )

    def next_batch(self) -> tuple[Tensor, Tensor]:
        pixel_BCHW, label_B, sent = self.ahead or self._send()
        self.ahead = self._send()
        if sent is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(sent)
            for tensor in (pixel_BCHW, label_B):
                tensor.record_stream(current)  # their memory was the side stream's, which must not reuse it too early
        return pixel_BCHW, label_B

    def _send(self) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
        """The loader's next batch on its way to the device; the event is the end of it."""
        byte_BCHW, label_B = self._loaded()
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            pixel_BCHW = byte_BCHW.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
            pixel_BCHW = pixel_BCHW.contiguous(memory_format=torch.channels_last)
            label_B = label_B.to(self.device, non_blocking=True)
            return pixel_BCHW, label_B, self.stream.record_event() if self.stream is not None else None

    def step(self, pixel_BCHW: Tensor, label_B: Tensor) -> Tensor:
        temp = self.temperature
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                enlarged_BCHW = self.enlarge(pixel_BCHW)
                soft = [source(enlarged_BCHW) for source in self.sources]
            output = self.target(pixel_BCHW, aux=True)
        loss = F.cross_entropy(output.logits_BK.float(), label_B)
        for aux_Bc, soft_Bc in zip(_split(output.aux_logits_BC, soft), soft, strict=True):
            log_q_Bc, p_Bc = F.log_softmax(aux_Bc.float() / temp, dim=1), F.softmax(soft_Bc.float() / temp, dim=1)
            loss = loss + temp**2 * F.kl_div(log_q_Bc, p_Bc, reduction="batchmean")
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return loss.detach()

    def close(self) -> None:
        super().close()
        self.ahead = None


class _Pictures(Dataset):
    """Images in memory, each made a PIL image and a view of it, as torchvision's CIFAR10 and STL10 do."""

    def __init__(self, images_NHWC: np.ndarray, labels_N: np.ndarray, finish: list[Any]) -> None:
        self.images_NHWC, self.labels_N = images_NHWC, labels_N
        window = transforms.RandomCrop(images_NHWC.shape[1], padding=PAD)
        self.view = transforms.Compose([window, transforms.RandomHorizontalFlip(), *finish])

    def __len__(self) -> int:
        return len(self.images_NHWC)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.view(Image.fromarray(self.images_NHWC[index])), int(self.labels_N[index])


def _split(aux_logits_BC: Tensor, soft: list[Tensor]) -> tuple[Tensor, ...]:
    """Auxiliary logits of each source."""
    return aux_logits_BC.split([s.shape[1] for s in soft], dim=1)
