"""What the target is asked to do: the loss on labels, and how well it does. A new task is a new file and a line here."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from .multi_label import MultiLabel
from .own_labels import OwnLabels
from .single_label import SingleLabel

__all__ = ["TASKS", "MultiLabel", "OwnLabels", "SingleLabel", "Task"]


class Task(Protocol):
    """Losses and figures of one kind of label.

    ``targets`` are as a data set has them: int64 [N] class indices, or float32 [N, C] with 1, 0 and -1 (not counted).

    Attributes:
        classes: how many.
    """

    classes: int

    @property
    def head_size(self) -> int:
        """Logits a sample."""
        ...

    def loss(self, logits_BK: Tensor, targets_B: Tensor) -> Tensor:
        """Loss of a batch against its labels: a float32 scalar, whatever the type of the logits."""
        ...

    def soft_loss(self, logits_BK: Tensor, teacher_logits_BK: Tensor, temperature: float) -> Tensor:
        """Loss of a batch against a teacher of the same classes, times ``temperature`` squared: a float32 scalar.

        No gradient flows into the teacher's logits.
        """
        ...

    def metric(self, targets_N: Tensor) -> str:
        """Name of the figure to select and report by, for data with these labels."""
        ...

    def evaluate(self, logits_NK: Tensor, targets_N: Tensor) -> dict[str, float]:
        """Figures in percent, and ``loss``.

        Raises:
            ValueError: labels of which a figure cannot be made.
        """
        ...

    def evaluate_videos(self, logits_NK: Tensor, targets_N: Tensor, video_N: Tensor) -> dict[str, float]:
        """:meth:`evaluate` of videos that were shown as several clips, with the metric over clips as ``clip_..``.

        ``loss`` is the mean over clips.
        """
        ...

    def by_video(self, logits_NK: Tensor, targets_N: Tensor, video_N: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (float64 [V, K]) and targets of videos from those of their clips, by the mean of the clips' probabilities.

        Args:
            logits_NK: of clips.
            targets_N: their videos' labels.
            video_N: int64, whose clips they are; a video's may lie anywhere. The videos are returned in ascending order.
        """
        ...

    def details(self, logits_NK: Tensor, targets_N: Tensor) -> dict[str, Any]:
        """What a report shows besides figures, as JSON can hold it: ``confusion`` or ``ap_per_class``."""
        ...


# classes, label smoothing -> task
TASKS: dict[str, Callable[[int, float], Task]] = {
    "single_label": SingleLabel,
    "multi_label": MultiLabel,
    "own_labels": OwnLabels,
}
