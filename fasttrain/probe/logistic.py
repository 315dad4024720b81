"""Linear classifiers on fixed features: logistic regression with an L2 penalty, by L-BFGS on all samples at once.

Shape suffixes: N samples, D features, K classes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_GAP = 1e-6  # of the objective above its least value, by the bound below, at which the search ends
_ROUND, _ROUNDS = 25, 80  # iterations between two looks at that bound, and how many looks there are at most
_HISTORY = 20
_FLOOR = 1e-3  # a feature's standard deviation counts as this share of the features' root mean square one at least


@dataclass(frozen=True)
class Standard:
    """Takes features to mean 0, standard deviation 1, and the whole of them to a length of about 1.

    Attributes:
        mean_D: of the training features.
        scale_D: their standard deviations times the square root of D.
    """

    mean_D: Tensor
    scale_D: Tensor

    @classmethod
    def of(cls, feature_ND: Tensor) -> "Standard":
        """The one that belongs to these training features. What hardly varies in them is not blown up."""
        variance_D, mean_D = torch.var_mean(feature_ND, dim=0, correction=0)
        floor = _FLOOR * variance_D.mean().sqrt()
        deviation_D = variance_D.sqrt().maximum(floor) if floor > 0 else torch.ones_like(mean_D)
        return cls(mean_D, deviation_D * math.sqrt(feature_ND.shape[1]))

    def apply_(self, feature_ND: Tensor) -> Tensor:
        """In place."""
        return feature_ND.sub_(self.mean_D).div_(self.scale_D)


@dataclass(frozen=True)
class Classifier:
    """``x W + b``.

    Attributes:
        weight_DK, bias_K: W and b.
        objective: what was minimised, at its end.
        gap: bound on how far that is above the least value.
    """

    weight_DK: Tensor
    bias_K: Tensor
    objective: float
    gap: float

    def __call__(self, feature_ND: Tensor) -> Tensor:
        """Logits [N, K]."""
        return feature_ND @ self.weight_DK + self.bias_K


def fit(feature_ND: Tensor, targets: Tensor, classes: int, *, l2: float, start: Classifier | None = None) -> Classifier:
    """The W and b that minimise ``J = sum_n l(x_n W + b, y_n) / N + l2 / 2 |W|^2``.

    l is the cross entropy of the softmax, or of many labels the sum over classes of the binary cross entropies of those that are
    counted, which makes K regressions of their own. J has one least value; where the gradient is g, J is at most
    ``|g|^2 / (2 l2)`` above it (strong convexity, but for b, which is not penalised).

    Args:
        feature_ND: float32 or float64; all arithmetic with them is in that type.
        targets: int64 [N], class indices; or float32 [N, K], 1, 0 and -1 for what is not counted.
        classes: K.
        l2: above 0.
        start: where to begin the search; None: at 0.
    """
    count, width = feature_ND.shape
    if targets.dim() == 1:
        wanted_NK = F.one_hot(targets, classes).to(feature_ND.dtype)
        counted_NK = None
    else:
        wanted_NK, counted_NK = targets.clamp(min=0).to(feature_ND.dtype), (targets >= 0).to(feature_ND.dtype)
    both_EK = feature_ND.new_zeros(width + 1, classes)  # W, and b below it
    if start is not None:
        both_EK[:width], both_EK[width] = start.weight_DK, start.bias_K
    both_EK.grad = torch.zeros_like(both_EK)

    def objective() -> float:
        """J, and its gradient written to ``both_EK.grad``."""
        weight_DK, gradient_EK = both_EK[:width], both_EK.grad
        assert gradient_EK is not None
        logits_NK = torch.addmm(both_EK[width], feature_ND, weight_DK)
        if counted_NK is None:
            log_NK = logits_NK.log_softmax(1)
            loss = -(log_NK * wanted_NK).sum(dtype=torch.float64)
            slope_NK = log_NK.exp_().sub_(wanted_NK).div_(count)
        else:
            each_NK = F.binary_cross_entropy_with_logits(logits_NK, wanted_NK, reduction="none")
            loss = (each_NK * counted_NK).sum(dtype=torch.float64)
            slope_NK = logits_NK.sigmoid_().sub_(wanted_NK).mul_(counted_NK).div_(count)
        torch.addmm(weight_DK, feature_ND.T, slope_NK, beta=l2, out=gradient_EK[:width])
        torch.sum(slope_NK, dim=0, out=gradient_EK[width])
        return float(loss / count + l2 / 2 * weight_DK.square().sum(dtype=torch.float64))

    search = torch.optim.LBFGS(
        [both_EK],
        max_iter=_ROUND,
        history_size=_HISTORY,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    least = math.inf
    for _ in range(_ROUNDS):
        value = float(search.step(objective))  # before the round
        gap = float(both_EK.grad.square().sum(dtype=torch.float64)) / (2 * l2)
        if gap <= _GAP or value >= least:  # or what is left is rounding
            break
        least = value
    return Classifier(both_EK[:width], both_EK[width], objective(), gap)
