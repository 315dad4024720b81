"""k-means over features that need not fit into memory twice: Lloyd's algorithm, the same bits with any number of threads.

A matrix product only proposes the nearest centroids. Which is the nearest is decided by distances that are sums of float64
in an order of our own, wherever the product's own error (which depends on threads, shapes and libraries) could decide.
Sums of clusters are exact: features are rounded to multiples of a power of two so small that float64 holds every sum of
them. So no order of adding, no chunk and no number of threads changes a bit, atomic additions on a GPU do not either, and
a pass need only move the features whose label has changed.

Shape suffixes: N features, B some of them, S a sample, D values of a feature, K centroids, C the nearest of them, P pairs of
a feature and a centroid (or rows), L trials.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain import checkpoint, interrupts
from fasttrain.loaders.order import order
from fasttrain.loaders.philox import draw, uniform

_START = 1 << 21  # the purpose of the random numbers; loaders/ has the others
_WIDTH = 64  # columns that a CPU's reductions take at a time; what is left over is slow
_ONE = 1 << 20  # what stands for one centroid, and is above their indices
_EVERY_S = 5.0  # seconds between two states, and two lines of a report


@dataclass(frozen=True)
class Clusters:
    """What k-means has found.

    Attributes:
        centroid_KD: float32, on the device of the features.
        inertia: sum of squared distances to the nearest centroid, at these centroids.
        count_K: int64, features of each cluster.
        iterations: passes made in all.
        settled: no label changed in the last pass.
    """

    centroid_KD: Tensor
    inertia: float
    count_K: Tensor
    iterations: int
    settled: bool


def kmeans(
    feature_ND: Tensor,
    count: int,
    *,
    seed: int,
    iterations: int,
    start_KD: Tensor | None = None,
    state: Path | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Clusters:
    """Lloyd's algorithm. A cluster that lost all its features gets the one that is farthest from its centroid.

    Args:
        feature_ND: float16 or float32, on any device.
        count: K.
        seed: of the start.
        iterations: passes at most; it ends when no label changes.
        start_KD: the first centroids; :func:`plus_plus` if not given.
        state: a file in which a call that was stopped leaves what it had, and from which the same call goes on, to the same
            bits; removed at the end.
        report: is told what is going on, in lines.

    Raises:
        ValueError: more clusters than features, or features that are not finite.
    """
    _check(feature_ND, count)
    with interrupts.held():
        unit, start = _survey(feature_ND), seed if start_KD is None else _checksum(start_KD)
        mark = f"{tuple(feature_ND.shape)} {feature_ND.dtype} {_checksum(feature_ND)} {count} {start}"
        run = _Lloyd(feature_ND, count, unit, mark, state, report)
        if not run.resume():
            run.begin(plus_plus(feature_ND, count, seed=seed) if start_KD is None else start_KD)
        try:
            while run.passes < iterations and not run.settled:
                run.step()
                run.save(_EVERY_S)
        except KeyboardInterrupt:
            run.save(0)
            raise
        found = run.result()
    if state is not None:
        state.unlink(missing_ok=True)
    return found


def plus_plus(feature_ND: Tensor, count: int, *, seed: int) -> Tensor:
    """Features to start from, far from each other: k-means++, Arthur and Vassilvitskii, SODA 2007, with greedy trials.

    Each next one is drawn with a probability proportional to its squared distance from those that there are; of
    2 + log(count) such draws that one stays which leaves the smallest sum of distances. Features beyond max(16384, 8 count)
    are not looked at: a random sample stands for them. Distances are between features rounded to about 20 bits, so that
    they are exact in float64 in any order of adding.

    Args:
        feature_ND: float16 or float32, on any device.
        count: K.
        seed: of the draws.

    Returns:
        float32 [K, D], on the device of the features.

    Raises:
        ValueError: more centroids than features.
    """
    _check(feature_ND, count)
    size, device = max(16384, 8 * count), feature_ND.device
    sample_SD = feature_ND
    if len(feature_ND) > size:
        chosen = np.sort(order(seed, 0, len(feature_ND))[:size])
        sample_SD = feature_ND[torch.from_numpy(chosen).to(device)]
    whole_SD = _whole_numbers(sample_SD)
    square_S = torch.cat([_sums(part_BD.square()) for part_BD in whole_SD.split(_piece(whole_SD))])
    trials = 2 + int(math.log(count))
    number_KL = uniform(draw(seed, np.repeat(np.arange(count), trials), np.tile(np.arange(trials), count), _START)[0])
    number_KL = number_KL.reshape(count, trials)

    def distances(index_L: Tensor) -> Tensor:
        """Exact: whole numbers below 2**53."""
        product_LS = whole_SD[index_L] @ whole_SD.T
        return product_LS.mul_(-2).add_(square_S).add_(square_S[index_L, None])

    taken = [int(number_KL[0, 0] * len(sample_SD))]
    nearest_S = distances(torch.tensor(taken, device=device))[0]
    for number_L in number_KL[1:]:
        sum_S = np.cumsum(nearest_S.cpu().numpy())
        drawn_L = np.searchsorted(sum_S, number_L * sum_S[-1], side="right").clip(max=len(sum_S) - 1)
        left_LS = torch.minimum(distances(torch.from_numpy(drawn_L).to(device)), nearest_S)
        best = int(np.argmin(_sums(left_LS.clone()).cpu().numpy()))
        taken.append(int(drawn_L[best]))
        nearest_S = left_LS[best]
        interrupts.check()
    return sample_SD[torch.tensor(taken, device=device)].float()


@torch.no_grad()
def nearest(feature_BD: Tensor, centroid_KD: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The nearest centroids of each feature; what else is in the batch does not matter to the last bit.

    Args:
        feature_BD: float16 or float32.
        centroid_KD: float32, on the same device.
        count: how many, at most K.

    Returns:
        Indices int64 [B, count], the nearest first, of equally near ones the lower index; squared distances float32.
    """
    assert 0 < count <= len(centroid_KD)
    search = _Search(centroid_KD)
    index_BC = torch.empty(len(feature_BD), count, dtype=torch.int64, device=feature_BD.device)
    distance_BC = torch.empty(index_BC.shape, device=feature_BD.device)
    for part in _chunks(feature_BD, len(centroid_KD)):
        index_BC[part], distance_BC[part] = search.nearest(feature_BD[part], count)
    return index_BC, distance_BC


class _Search:
    """Finds nearest centroids.

    Scores are ``|c|^2 - 2 x.c``, with the centroids' mean taken from c, and from x too where it is long beside what is left
    of c. Their error is at most ``u ((2 D + 16) |x| max|c| + 16 max|c|^2)``, by the usual bound of a dot product (Higham,
    "Accuracy and Stability of Numerical Algorithms", section 3.1), u the unit roundoff. All centroids whose score is within
    twice of that of the lowest are compared by exact distances.
    """

    def __init__(self, centroid_KD: Tensor) -> None:
        self.centroid_KD = centroid_KD
        count, size = centroid_KD.shape
        assert count <= _ONE
        mean_D = (_sums(centroid_KD.double().T.contiguous()) / count).float()
        moved_KD = centroid_KD - mean_D
        bias_K = _sums(moved_KD.double().square_())
        largest = float(bias_K.max().sqrt())
        self.mean_D = mean_D if float(mean_D.norm()) > 2 * largest else None
        if self.mean_D is None:
            bias_K += 2 * _sums(moved_KD.double().mul_(mean_D))
        self.moved_DK, self.bias_K = moved_KD.T, bias_K.float()
        self.code_K = torch.arange(_ONE, _ONE + count + -count % _WIDTH, device=centroid_KD.device).float()
        self.score_BK = centroid_KD.new_empty(0, len(self.code_K))
        unit = 2.0 ** (-24 if torch.get_float32_matmul_precision() == "highest" else -8)
        self.per_length = 2.002 * unit * (2 * size + 16) * largest  # .002: what the length itself is wrong by
        self.at_least = 32 * unit * largest**2 + size * 2.0**-120  # the last for what underflows

    def _scores(self, feature_BD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K], K filled up with infinities to whole vectors of a CPU; overwritten by the next call. And how much above the
        lowest is to be compared: [B]."""
        rows, count = len(feature_BD), len(self.centroid_KD)
        if rows > len(self.score_BK):
            self.score_BK = self.score_BK.new_empty(rows, self.score_BK.shape[1])
        score_BK = self.score_BK[:rows]
        score_BK[:, count:] = math.inf
        x_BD = feature_BD.float() if self.mean_D is None else feature_BD - self.mean_D
        with torch.autocast(x_BD.device.type, enabled=False):
            torch.addmm(self.bias_K, x_BD, self.moved_DK, alpha=-2, out=score_BK[:, :count])
        return score_BK, torch.linalg.vector_norm(x_BD, dim=1).mul_(self.per_length).add_(self.at_least)

    def labels(self, feature_BD: Tensor) -> Tensor:
        """The nearest centroid of each: int64 [B]."""
        score_BK, slack_B = self._scores(feature_BD)
        one_BK = score_BK.le_((score_BK.amin(1) + slack_B)[:, None]).mul_(self.code_K)
        label_B = (one_BK.sum(1) - _ONE).long()  # the index if there is one, and beyond any if there are several
        unclear = ((label_B < 0) | (label_B >= _ONE)).nonzero()[:, 0]  # none where the arithmetic overflowed
        if len(unclear):
            some_BK = one_BK[unclear, : len(self.centroid_KD)] > 0
            some_BK |= ~some_BK.any(1, keepdim=True)
            row_P, index_P = some_BK.nonzero(as_tuple=True)
            row_P, index_P, _ = self._sorted(feature_BD[unclear], row_P, index_P)
            first_P = torch.ones_like(row_P, dtype=torch.bool)
            first_P[1:] = row_P[1:] != row_P[:-1]
            label_B[unclear] = index_P[first_P]
        return label_B

    def nearest(self, feature_BD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """As the function of that name."""
        if count == 1:
            label_B = self.labels(feature_BD)
            return label_B[:, None], self.distances(feature_BD, label_B).float()[:, None]
        score_BK, slack_B = self._scores(feature_BD)
        score_BK = score_BK[:, : len(self.centroid_KD)]
        limit_B = score_BK.topk(count, largest=False).values[:, -1] + slack_B
        row_P, index_P = (score_BK > limit_B[:, None]).logical_not_().nonzero(as_tuple=True)
        row_P, index_P, distance_P = self._sorted(feature_BD, row_P, index_P)
        begin_B = torch.searchsorted(row_P, torch.arange(len(feature_BD), device=row_P.device))
        at_BC = begin_B[:, None] + torch.arange(count, device=row_P.device)
        return index_P[at_BC], distance_P[at_BC].float()

    def distances(self, feature_BD: Tensor, label_B: Tensor) -> Tensor:
        """Squared distances of each feature from its centroid: float64 [B]."""
        parts = [slice(at, at + _piece(feature_BD)) for at in range(0, len(feature_BD), _piece(feature_BD))]
        return torch.cat([self._distances(feature_BD[part], label_B[part]) for part in parts])

    def _distances(self, feature_BD: Tensor, label_B: Tensor) -> Tensor:
        centroid_BD = self.centroid_KD.index_select(0, label_B).double()
        return _sums(centroid_BD.sub_(feature_BD.double()).square_())

    def _sorted(self, feature_BD: Tensor, row_P: Tensor, index_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs by feature, of each by distance, then by index; and the distances. They come by feature, then by index."""
        parts = zip(row_P.split(_piece(feature_BD)), index_P.split(_piece(feature_BD)), strict=True)
        distance_P = torch.cat([self._distances(feature_BD.index_select(0, row), index) for row, index in parts])
        by_P = torch.argsort(distance_P, stable=True)
        by_P = by_P[torch.argsort(row_P[by_P], stable=True)]
        return row_P, index_P[by_P], distance_P[by_P]


class _Lloyd:
    """A run of Lloyd's algorithm: where it is after whole passes."""

    centroid_KD: Tensor
    label_N: Tensor
    sum_KD: Tensor
    count_K: Tensor

    def __init__(
        self, feature_ND: Tensor, count: int, unit: float, mark: str, path: Path | None, report: Callable[[str], None]
    ) -> None:
        self.feature_ND, self.count, self.mark, self.path, self.report = feature_ND, count, mark, path, report
        self.rounder = 1.5 * 2.0**52 * unit
        self.passes, self.settled = 0, False
        self.saved, self.told = (-1, time.monotonic()), time.monotonic()

    def begin(self, centroid_KD: Tensor) -> None:
        device = self.feature_ND.device
        assert centroid_KD.shape == (self.count, self.feature_ND.shape[1])
        self.centroid_KD = centroid_KD.to(device, torch.float32, copy=True).contiguous()
        self.label_N = torch.full((len(self.feature_ND),), -1, device=device)
        self._count()

    def _count(self) -> None:
        """Sums and counts of clusters from labels."""
        size, device = self.feature_ND.shape[1], self.feature_ND.device
        self.sum_KD = torch.zeros(self.count, size, dtype=torch.float64, device=device)
        self.count_K = torch.zeros(self.count, dtype=torch.int64, device=device)
        none = torch.full_like(self.label_N, -1)
        for part in self._parts():
            self._move(part, none[part], self.label_N[part])

    def _parts(self) -> Iterator[slice]:
        for part in _chunks(self.feature_ND, self.count):
            yield part
            interrupts.check()

    def _move(self, rows: slice, old_B: Tensor, new_B: Tensor) -> None:
        """Moves features between the clusters' sums, those whose label has changed; -1 is none."""
        for sign, label_B in ((-1, old_B), (1, new_B)):
            changed = ((old_B != new_B) & (label_B >= 0)).nonzero()[:, 0]
            self.count_K.add_(torch.bincount(label_B[changed], minlength=self.count), alpha=sign)
            for some in changed.split(_piece(self.feature_ND)):
                x_BD = self.feature_ND[rows].index_select(0, some).double().add_(self.rounder).sub_(self.rounder)
                self.sum_KD.index_add_(0, label_B[some], x_BD, alpha=sign)

    @torch.no_grad()
    def step(self) -> None:
        """One pass: labels, then centroids."""
        search, label_N = _Search(self.centroid_KD), torch.empty_like(self.label_N)
        for part in self._parts():
            label_N[part] = search.labels(self.feature_ND[part])
            self._move(part, self.label_N[part], label_N[part])
        filled = self._fill(search, label_N)
        changed = int((label_N != self.label_N).sum())
        full_K = self.count_K > 0
        mean_KD = (self.sum_KD / self.count_K.clamp(min=1)[:, None]).float()
        self.centroid_KD = torch.where(full_K[:, None], mean_KD, self.centroid_KD)
        self.label_N, self.passes = label_N, self.passes + 1
        self.settled = not changed
        if time.monotonic() - self.told >= _EVERY_S:
            self.told = time.monotonic()
            self.report(f"k-means: pass {self.passes}, {changed} labels changed, {filled} empty clusters filled")

    def _fill(self, search: _Search, label_N: Tensor) -> int:
        """Gives each empty cluster the feature farthest from its centroid, if it is not alone there; returns how many."""
        empty = (self.count_K == 0).nonzero()[:, 0].tolist()
        if not empty:
            return 0
        distance_N = self._distances(search, label_N)
        by_N, moved = torch.argsort(distance_N, descending=True, stable=True), 0
        for at in by_N.tolist():
            if moved == len(empty) or distance_N[at] == 0:
                break
            old = int(label_N[at])
            if self.count_K[old] > 1:
                new = torch.tensor([empty[moved]], device=label_N.device)
                self._move(slice(at, at + 1), label_N[at : at + 1], new)
                label_N[at] = new[0]
                moved += 1
        return moved

    def _distances(self, search: _Search, label_N: Tensor) -> Tensor:
        return torch.cat([search.distances(self.feature_ND[part], label_N[part]) for part in self._parts()])

    @torch.no_grad()
    def result(self) -> Clusters:
        """At the centroids that there are now."""
        search, label_N = _Search(self.centroid_KD), self.label_N
        if not self.settled:
            label_N = torch.cat([search.labels(self.feature_ND[part]) for part in self._parts()])
        inertia = float(_sums(self._distances(search, label_N)[None])[0])
        count_K = torch.bincount(label_N, minlength=self.count)
        how = "no label changes any more" if self.settled else "labels still change"
        self.report(f"k-means: {len(label_N)} features in {self.count} clusters, {self.passes} passes, {how}")
        return Clusters(self.centroid_KD, inertia, count_K, self.passes, self.settled)

    def save(self, every_s: float) -> None:
        """Writes the state if there is news and so many seconds have passed."""
        if self.path is None or self.passes == self.saved[0] or time.monotonic() - self.saved[1] < every_s:
            return
        content: dict[str, Any] = {"kmeans": self.mark, "passes": self.passes, "settled": self.settled}
        tensors = {"centroids": self.centroid_KD.cpu(), "labels": self.label_N.int().cpu()}
        checkpoint.save(self.path, content | tensors)
        self.saved = (self.passes, time.monotonic())

    def resume(self) -> bool:
        """Takes up the state in the file, if it is of the same features and the same question."""
        if self.path is None or not self.path.exists():
            return False
        try:
            content = checkpoint.load(self.path)
        except ValueError as error:
            self.report(f"k-means begins anew: {error}")
            return False
        if content.get("kmeans") != self.mark:
            self.report(f"k-means begins anew: {self.path} is of other features, another count or another seed")
            return False
        device = self.feature_ND.device
        self.centroid_KD, self.label_N = content["centroids"].to(device), content["labels"].long().to(device)
        self.passes, self.settled = content["passes"], content["settled"]
        self.saved = (self.passes, time.monotonic())
        self._count()
        self.report(f"k-means goes on after pass {self.passes}")
        return True


def _check(feature_ND: Tensor, count: int) -> None:
    if not 0 < count <= len(feature_ND):
        raise ValueError(f"pretext.clusters: {count}, but there are only {len(feature_ND)} features to cluster")


def _chunks(feature_ND: Tensor, count: int) -> Iterator[slice]:
    """Rows at a time: enough to keep a GPU busy, and few enough for the cache of a CPU."""
    at_once, most = (2**27, 2**17) if feature_ND.device.type == "cuda" else (2**20, 2**13)
    rows = min(most, max(256, at_once // max(count, feature_ND.shape[1])))
    for at in range(0, len(feature_ND), rows):
        yield slice(at, at + rows)


def _piece(feature_ND: Tensor) -> int:
    """Rows of float64 at a time."""
    return max(1, (2**24 if feature_ND.device.type == "cuda" else 2**17) // feature_ND.shape[1])


def _survey(feature_ND: Tensor) -> float:
    """The unit to which features are rounded in sums, so that 53 bits hold any sum."""
    largest = 0.0
    for part in _chunks(feature_ND, 1):
        low, high = (float(v) for v in torch.aminmax(feature_ND[part]))
        if not math.isfinite(high - low):
            at = part.start + int((~feature_ND[part].isfinite().all(1)).nonzero()[0])
            raise ValueError(f"the features to cluster must be finite numbers; those at index {at} are not")
        largest = max(largest, -low, high)
        interrupts.check()
    return 2.0 ** (math.frexp(largest)[1] + math.ceil(math.log2(max(2, len(feature_ND)))) - 52)


def _checksum(feature_ND: Tensor) -> int:
    """Of the bits of 1024 features at most. Whole numbers modulo 2**64: any order of adding gives the same."""
    chosen = torch.linspace(0, len(feature_ND) - 1, min(1024, len(feature_ND)), dtype=torch.float64).long()
    x_SD = feature_ND[chosen.to(feature_ND.device)].contiguous()
    bits_SD = x_SD.view(torch.int32 if x_SD.dtype == torch.float32 else torch.int16).long()
    weight_S, weight_D = (torch.arange(n, device=x_SD.device) * 2 + 1 for n in x_SD.shape)
    return int(((bits_SD * weight_D).sum(1) * weight_S).sum())


def _sums(x_PD: Tensor) -> Tensor:
    """Sums of the rows of float64 [P, D], by halves, so that the order depends on D alone; destroys ``x_PD``."""
    while (size := x_PD.shape[1]) > 1:
        half = size // 2
        x_PD[:, :half] += x_PD[:, size - half :]
        x_PD = x_PD[:, : size - half]
    return x_PD[:, 0].clone()


def _whole_numbers(x_SD: Tensor) -> Tensor:
    """Features less the first one, as whole numbers so small that squared distances are exact in float64: [S, D]."""
    whole_SD = x_SD.double()
    whole_SD -= whole_SD[0].clone()
    bits = (51 - math.ceil(math.log2(max(2, whole_SD.shape[1])))) // 2
    return whole_SD.mul_(2.0 ** (bits - math.frexp(max(abs(float(v)) for v in torch.aminmax(whole_SD)))[1])).round_()
