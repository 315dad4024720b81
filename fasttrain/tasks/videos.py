"""Videos that were shown as several clips."""

from torch import Tensor


def mean_of_clips(probability_NX: Tensor, targets_N: Tensor, video_N: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the clips of each video (float64 [V, X], on the CPU), and the videos' targets, videos ascending.

    Args:
        probability_NX: of clips, in float64.
        targets_N: their videos' labels, [N] or [N, C].
        video_N: int64, whose clips they are; a video's may lie anywhere.
    """
    probability_NX, targets_N, video_N = probability_NX.cpu(), targets_N.cpu(), video_N.cpu()
    video_V, of_N, count_V = video_N.unique(return_inverse=True, return_counts=True)
    sum_VX = probability_NX.new_zeros(len(video_V), probability_NX.shape[1]).index_add_(0, of_N, probability_NX)
    targets_V = targets_N.new_zeros(len(video_V), *targets_N.shape[1:]).index_copy_(0, of_N, targets_N)
    return sum_VX / count_V[:, None], targets_V
