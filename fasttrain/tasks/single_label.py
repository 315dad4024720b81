"""One class an image or video."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
        """Figures of videos that were shown as several clips, by the mean of their clips' probabilities.

        Args:
            logits_NK: of clips.
            targets_N: their videos' classes.
            video_N: int64, whose clips they are; a video's may lie anywhere.

        Returns:
            What :meth:`evaluate` gives, of videos, with ``clip_accuracy``; ``loss`` is the mean over clips.
        """
        logits_NK, targets_N, video_N = logits_NK.double().cpu(), targets_N.cpu(), video_N.cpu()
        video_V, of_N, count_V = video_N.unique(return_inverse=True, return_counts=True)
        sum_VK = torch.zeros(len(video_V), self.classes, dtype=torch.float64).index_add_(0, of_N, logits_NK.softmax(1))
        targets_V = targets_N.new_zeros(len(video_V)).index_copy_(0, of_N, targets_N)
        out = self.evaluate((sum_VK / count_V[:, None]).log(), targets_V)
        clip_accuracy = 100 * float((logits_NK.argmax(1) == targets_N).double().mean())
        return out | {"clip_accuracy": clip_accuracy, "loss": float(F.cross_entropy(logits_NK, targets_N))}

    def metric(self, targets_N: Tensor) -> str:
        """The figure to select and report by: accuracy, or balanced accuracy if the largest class is over 1.5 times
        the smallest (where always naming the largest class would look good)."""
        counts = torch.bincount(targets_N, minlength=self.classes)
        return "balanced_accuracy" if counts.max() > 1.5 * counts.min() else "accuracy"
