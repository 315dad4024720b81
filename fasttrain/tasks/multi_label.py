"""Any number of classes an image or video, as in Pascal VOC.

Targets are float32 [N, C]: 1 for a class that is shown, 0 for one that is not, -1 where that is not to be counted.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .videos import mean_of_clips


class MultiLabel:
    """Binary cross entropy; average precision over classes, VOC 2007's form of it, and over images.

    Args:
        classes: how many.
        label_smoothing: a label y is learned as ``(1 - label_smoothing) * y + label_smoothing / 2``: the share is spread
            over the two answers of a class, as it is spread over all answers where one class is right.
    """

    def __init__(self, classes: int, label_smoothing: float = 0.0) -> None:
        self.classes, self.label_smoothing = classes, label_smoothing

    @property
    def head_size(self) -> int:
        """Logits a sample."""
        return self.classes

    def loss(self, logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Mean binary cross entropy of the labels that are counted, in float32; 0 if none is."""
        counted_BK = (targets_BK >= 0).float()
        targets_BK = targets_BK * (1 - self.label_smoothing) + self.label_smoothing / 2
        sum_ = F.binary_cross_entropy_with_logits(
            logits_BK.float(), targets_BK.float(), weight=counted_BK, reduction="sum"
        )
        return sum_ / counted_BK.sum().clamp(min=1)

    def soft_loss(self, logits_BK: Tensor, teacher_logits_BK: Tensor, temperature: float) -> Tensor:
        """``T^2 * KL(Bernoulli(sigmoid(t/T)) || Bernoulli(sigmoid(s/T)))``, mean over batch and classes, in float32.

        Knowledge distillation is published for softmax alone (Hinton et al., arXiv:1503.02531). This is our extension of
        it: what the binary cross entropy is to the cross entropy. No gradient flows into the teacher's logits t.
        """
        student_BK, teacher_BK = logits_BK.float() / temperature, teacher_logits_BK.detach().float() / temperature
        shown_BK = teacher_BK.sigmoid() * (F.logsigmoid(teacher_BK) - F.logsigmoid(student_BK))
        not_shown_BK = (-teacher_BK).sigmoid() * (F.logsigmoid(-teacher_BK) - F.logsigmoid(-student_BK))
        return temperature**2 * (shown_BK + not_shown_BK).mean()

    def evaluate(self, logits_NK: Tensor, targets_NK: Tensor) -> dict[str, float]:
        """Figures in percent, and the mean ``loss`` of the counted labels without label smoothing.

        * ``map``: average precision of each class over the images (the area under the steps of precision over recall,
          equal scores being one step), mean over classes.
        * ``map_11point``: the same by VOC 2007's rule, see :func:`average_precision_11_point`.
        * ``sample_ap``: average precision of each image over the classes, mean over images that show a class. This is what
          the published SSKT code calls AP (it counts classes of only difficult objects as not shown, here they are not
          counted); always naming the frequent classes gives a high one.

        Classes that no image shows have no average precision and are left out of the means; :meth:`details` has None
        for them.

        Raises:
            ValueError: no image shows any class.
        """
        logits_NK, targets_NK = logits_NK.double().cpu(), targets_NK.cpu()
        counted_NK = targets_NK >= 0
        loss_NK = F.binary_cross_entropy_with_logits(logits_NK, targets_NK.double(), reduction="none")
        ap = [a for a in class_average_precision(logits_NK, targets_NK) if a is not None]
        if not ap:
            raise ValueError(
                f"none of the {len(targets_NK)} samples to be evaluated shows any of the {self.classes} classes"
            )
        ap_11 = [
            average_precision_11_point(s, t) for s, t in zip(logits_NK.T, targets_NK.T, strict=True) if (t > 0).any()
        ]
        return {
            "map": 100 * float(np.mean(ap)),
            "map_11point": 100 * float(np.mean(ap_11)),
            "sample_ap": 100 * float(sample_average_precision(logits_NK, targets_NK).mean()),
            "loss": float(loss_NK[counted_NK].mean()),
        }

    def evaluate_videos(self, logits_NK: Tensor, targets_NK: Tensor, video_N: Tensor) -> dict[str, float]:
        """What :meth:`evaluate` gives, of videos (see :meth:`by_video`), with ``clip_map``.

        ``loss`` is the mean over clips.
        """
        clips = self.evaluate(logits_NK, targets_NK)
        videos = self.evaluate(*self.by_video(logits_NK, targets_NK, video_N))
        return videos | {"clip_map": clips["map"], "loss": clips["loss"]}

    def by_video(self, logits_NK: Tensor, targets_NK: Tensor, video_N: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (float64 [V, K]) and targets of videos, by the mean of their clips' probabilities.

        Args:
            logits_NK: of clips.
            targets_NK: their videos' labels.
            video_N: int64, whose clips they are; a video's may lie anywhere. The videos are returned in ascending order.
        """
        logits_NK = logits_NK.double().cpu()
        # both answers' means, so that neither is rounded away where the other is near 1
        both_N2K = torch.cat([logits_NK.sigmoid(), (-logits_NK).sigmoid()], dim=1)
        both_V2K, targets_VK = mean_of_clips(both_N2K, targets_NK, video_N)
        shown_VK, not_shown_VK = both_V2K.split(self.classes, dim=1)
        return shown_VK.log() - not_shown_VK.log(), targets_VK

    def details(self, logits_NK: Tensor, targets_NK: Tensor) -> dict[str, list[float | None]]:
        """``ap_per_class``: what ``map`` is the mean of, in percent; None for a class that no image shows."""
        ap = class_average_precision(logits_NK.double().cpu(), targets_NK.cpu())
        return {"ap_per_class": [None if a is None else 100 * a for a in ap]}

    def metric(self, targets_NK: Tensor) -> str:
        """The figure to select and report by: class mAP."""
        return "map"


def class_average_precision(score_NK: Tensor, targets_NK: Tensor) -> list[float | None]:
    """Average precision of each class over the images whose label is counted; None without an image that shows it."""
    from torchmetrics.functional.classification import binary_average_precision  # slow to import

    out: list[float | None] = []
    for score_N, target_N in zip(score_NK.T, targets_NK.T, strict=True):
        score_M, target_M = score_N[target_N >= 0], target_N[target_N >= 0].long()
        if target_M.any():
            # only the order counts; of scores beyond 0 and 1 torchmetrics takes the sigmoid, which makes large ones equal
            rank_M = score_M.unique(return_inverse=True)[1].double() / len(score_M)
            out.append(float(binary_average_precision(rank_M, target_M)))
        else:
            out.append(None)
    return out


def average_precision_11_point(score_N: Tensor, target_N: Tensor) -> float:
    """Average precision as in VOC 2007: the largest precision at a recall of at least t, mean over t = 0, 0.1, .. 1.

    As in the VOC 2007 development kit (``VOCevalcls``): images whose label is not counted are neither right nor wrong,
    and images of equal score are taken in their given order. Recall is compared with t exactly, in whole numbers (0.3 in
    floating point can be a little more than 3 of 10 images).

    Args:
        score_N: one class's scores of the images.
        target_N: 1, 0 and -1; at least one 1.
    """
    score_M, target_M = score_N[target_N >= 0], target_N[target_N >= 0]
    found_M = target_M[score_M.argsort(descending=True, stable=True)].long().cumsum(0)
    precision_M = found_M.double() / torch.arange(1, len(found_M) + 1)
    best_M = precision_M.flip(0).cummax(0).values.flip(0)  # at this recall or a higher one
    first_11 = torch.searchsorted(10 * found_M, torch.arange(11) * found_M[-1])
    return float(best_M[first_11].mean())


def sample_average_precision(score_NK: Tensor, targets_NK: Tensor) -> Tensor:
    """Average precision of each image over the classes, of images that show one: float64 [M].

    The mean, over the classes that an image shows, of the precision among the classes that score at least as high.
    """
    shown_NK = targets_NK > 0
    score_NK, shown_NK, counted_NK = (t[shown_NK.any(1)].contiguous() for t in (score_NK, shown_NK, targets_NK >= 0))

    def at_least_MK(which_MK: Tensor) -> Tensor:
        """How many of the classes ``which`` score at least as high as each class."""
        sorted_MK = score_NK.masked_fill(~which_MK, -torch.inf).sort(1).values
        return score_NK.shape[1] - torch.searchsorted(sorted_MK, score_NK)

    precision_MK = at_least_MK(shown_NK).double() / at_least_MK(counted_NK).clamp(min=1)
    return (precision_MK * shown_NK).sum(1) / shown_NK.sum(1)
