"""One class an image or video."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .videos import mean_of_clips


class SingleLabel:
    """Cross entropy; accuracy, balanced accuracy and, with two classes, area under the ROC curve.

    Args:
        classes: how many.
        label_smoothing: share of the label spread over all classes.
    """

    def __init__(self, classes: int, label_smoothing: float = 0.0) -> None:
        self.classes, self.label_smoothing = classes, label_smoothing

    @property
    def head_size(self) -> int:
        """Logits a sample."""
        return self.classes

    def loss(self, logits_BK: Tensor, targets_B: Tensor) -> Tensor:
        """Mean cross entropy of the batch, in float32."""
        return F.cross_entropy(logits_BK.float(), targets_B, label_smoothing=self.label_smoothing)

    def soft_loss(self, logits_BK: Tensor, teacher_logits_BK: Tensor, temperature: float) -> Tensor:
        """``T^2 * KL(softmax(t/T) || softmax(s/T))``, mean over the batch, in float32 (Hinton et al., arXiv:1503.02531).

        No gradient flows into the teacher's logits t.
        """
        student_BK = (logits_BK.float() / temperature).log_softmax(1)
        teacher_BK = (teacher_logits_BK.detach().float() / temperature).log_softmax(1)
        return temperature**2 * F.kl_div(student_BK, teacher_BK, reduction="batchmean", log_target=True)

    def evaluate(self, logits_NK: Tensor, targets_N: Tensor) -> dict[str, float]:
        """Figures in percent: ``accuracy``, ``balanced_accuracy`` (mean over the classes of the share found), ``top5``
        with more than five classes, ``auroc`` with two; and the mean ``loss`` without label smoothing."""
        from torchmetrics import Metric, MetricCollection  # slow to import
        from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

        logits_NK, targets_N = logits_NK.float().cpu(), targets_N.cpu()
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(self.classes, average="micro"),
            "balanced_accuracy": MulticlassAccuracy(self.classes, average="macro"),
        }
        if self.classes > 5:
            metrics["top5"] = MulticlassAccuracy(self.classes, average="micro", top_k=5)
        values = MetricCollection(metrics)(logits_NK, targets_N)
        if self.classes == 2:
            values["auroc"] = BinaryAUROC()(logits_NK[:, 1] - logits_NK[:, 0], targets_N)
        out = {name: 100 * float(value) for name, value in values.items()}
        return out | {"loss": float(F.cross_entropy(logits_NK.double(), targets_N))}

    def evaluate_videos(self, logits_NK: Tensor, targets_N: Tensor, video_N: Tensor) -> dict[str, float]:
        """What :meth:`evaluate` gives, of videos (see :meth:`by_video`), with ``clip_accuracy``.

        ``loss`` is the mean over clips.
        """
        logits_NK, targets_N = logits_NK.double().cpu(), targets_N.cpu()
        out = self.evaluate(*self.by_video(logits_NK, targets_N, video_N))
        clip_accuracy = 100 * float((logits_NK.argmax(1) == targets_N).double().mean())
        return out | {"clip_accuracy": clip_accuracy, "loss": float(F.cross_entropy(logits_NK, targets_N))}

    def by_video(self, logits_NK: Tensor, targets_N: Tensor, video_N: Tensor) -> tuple[Tensor, Tensor]:
        """Log probabilities (float64 [V, K]) and classes of videos, by the mean of their clips' probabilities.

        Args:
            logits_NK: of clips.
            targets_N: their videos' classes.
            video_N: int64, whose clips they are; a video's may lie anywhere. The videos are returned in ascending order.
        """
        probability_VK, targets_V = mean_of_clips(logits_NK.double().cpu().softmax(1), targets_N, video_N)
        return probability_VK.log(), targets_V

    def details(self, logits_NK: Tensor, targets_N: Tensor) -> dict[str, list[list[int]]]:
        """``confusion``: how many samples of each class (row) were given each answer (column)."""
        cell_N = targets_N.cpu() * self.classes + logits_NK.cpu().argmax(1)
        counts = torch.bincount(cell_N, minlength=self.classes**2).view(self.classes, self.classes)
        return {"confusion": counts.tolist()}

    def metric(self, targets_N: Tensor) -> str:
        """The figure to select and report by: accuracy, or balanced accuracy if the largest class is over 1.5 times
        the smallest (where always naming the largest class would look good)."""
        counts = torch.bincount(targets_N, minlength=self.classes)
        return "balanced_accuracy" if counts.max() > 1.5 * counts.min() else "accuracy"
