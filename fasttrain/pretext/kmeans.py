"""k-means over features that need not fit into memory twice: Lloyd's algorithm, the same bits on every device.

A matrix product only proposes the nearest centroids. Which is the nearest is decided by distances that are sums of float64
in an order of our own, wherever the product's own error (which depends on threads, shapes and libraries) could decide.
Sums of clusters are exact: features are rounded to multiples of a power of two so small that float64 holds every sum of
them. So no order of adding, no chunk and no number of threads changes a bit, atomic additions on a GPU do not either, and
a pass need only move the features whose label has changed.

Shape suffixes: N features, B some of them, S a sample, D values of a feature, K centroids, G J centroids in G groups of J,
P pairs of a feature and a centroid, L trials.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain import checkpoint, interrupts
from fasttrain.loaders.order import order
from fasttrain.loaders.philox import draw, uniform

_START = 1 << 21  # the purpose of the random numbers; loaders/ has the others
_GROUPS = 16
_SAVE_S = 5.0  # seconds between two states


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
        scale, checksum = _survey(feature_ND)
        start_sum = "" if start_KD is None else _checksum(start_KD.float(), 0)
        mark = f"{list(feature_ND.shape)} {feature_ND.dtype} {checksum} {count} {seed} {start_sum}"
        run = _Lloyd(feature_ND, count, scale, mark, state, report)
        if not run.resume():
            run.begin(plus_plus(feature_ND, count, seed=seed) if start_KD is None else start_KD)
        try:
            while run.passes < iterations and not run.settled:
                run.step()
                run.save(_SAVE_S)
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
    square_S = _sums(whole_SD * whole_SD)
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

    The product's error is at most ``u (2 D + 16) |x| max|c| + 8 u max|c|^2`` for each centroid, by the usual bound of a dot
    product (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1), u the unit roundoff; it is smaller with
    the centroids' mean taken from both sides. All within twice of that are compared by exact distances.
    """

    def __init__(self, centroid_KD: Tensor) -> None:
        self.centroid_KD = centroid_KD
        self.mean_D = (_sums(centroid_KD.double().T.contiguous()) / len(centroid_KD)).float()
        moved_KD = centroid_KD - self.mean_D
        square_K = _sums(moved_KD.double().square_())
        missing = -len(moved_KD) % _GROUPS
        self.moved_DK = F.pad(moved_KD, (0, 0, 0, missing)).T
        self.square_K = F.pad(square_K.float(), (0, missing), value=math.inf)
        exact = torch.get_float32_matmul_precision() == "highest"
        unit, size = 2.0 ** (-24 if exact else -8), centroid_KD.shape[1]
        largest = float(square_K.max().sqrt())
        self.per_length = 2 * unit * (2 * size + 16) * largest
        self.at_least = 16 * unit * largest**2 + size * 2.0**-120  # the last for what underflows

    def _scores(self, feature_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances less the feature's own square [B, K], about, and by how much they may be apart from the lowest."""
        moved_BD = feature_BD.float() - self.mean_D
        with torch.autocast(moved_BD.device.type, enabled=False):
            score_BK = torch.addmm(self.square_K, moved_BD, self.moved_DK, alpha=-2)
        return score_BK, torch.linalg.vector_norm(moved_BD, dim=1) * (1.001 * self.per_length) + self.at_least

    def labels(self, feature_BD: Tensor) -> Tensor:
        """The nearest centroid of each: int64 [B]."""
        score_BK, slack_B = self._scores(feature_BD)
        score_BGJ = score_BK.view(len(score_BK), _GROUPS, -1)
        low_BJ = score_BGJ.amin(1)
        limit_B = low_BJ.amin(1) + slack_B
        row, j = (low_BJ > limit_B[:, None]).logical_not_().nonzero(as_tuple=True)
        hit, group = (score_BGJ[row, :, j] > limit_B[row, None]).logical_not_().nonzero(as_tuple=True)
        row_P, index_P = row[hit], group * score_BGJ.shape[2] + j[hit]
        label_B = torch.zeros(len(feature_BD), dtype=torch.int64, device=feature_BD.device)
        label_B[row_P] = index_P
        if len(row_P) > len(label_B):
            several_P = (torch.bincount(row_P)[row_P] > 1) & (index_P < len(self.centroid_KD))
            row_P, index_P = row_P[several_P], index_P[several_P]
            row_P, index_P, _ = self._sorted(feature_BD, row_P, index_P)
            first_P = torch.ones_like(row_P, dtype=torch.bool)
            first_P[1:] = row_P[1:] != row_P[:-1]
            label_B[row_P[first_P]] = index_P[first_P]
        return label_B

    def nearest(self, feature_BD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """As the function of that name."""
        size = len(self.centroid_KD)
        if count == 1:
            label_B = self.labels(feature_BD)
            return label_B[:, None], self.distances(feature_BD, label_B).float()[:, None]
        score_BK, slack_B = self._scores(feature_BD)
        limit_B = score_BK[:, :size].topk(count, largest=False).values[:, -1] + slack_B
        row_P, index_P = (score_BK[:, :size] > limit_B[:, None]).logical_not_().nonzero(as_tuple=True)
        row_P, index_P, distance_P = self._sorted(feature_BD, row_P, index_P)
        begin_B = torch.searchsorted(row_P, torch.arange(len(feature_BD), device=row_P.device))
        at_BC = begin_B[:, None] + torch.arange(count, device=row_P.device)
        return index_P[at_BC], distance_P[at_BC].float()

    def distances(self, feature_BD: Tensor, label_B: Tensor) -> Tensor:
        """Squared distances of each feature from its centroid: float64 [B]."""
        rows = max(1, 2**20 // feature_BD.shape[1])
        parts = zip(feature_BD.split(rows), label_B.split(rows), strict=True)
        found = [_sums((x_BD.double() - self.centroid_KD[label]).square_()) for x_BD, label in parts]
        return torch.cat(found) if found else label_B.double()

    def _sorted(self, feature_BD: Tensor, row_P: Tensor, index_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs by feature, of each by distance, then by index; and the distances."""
        rows = max(1, 2**20 // feature_BD.shape[1])
        parts = zip(row_P.split(rows), index_P.split(rows), strict=True)
        distance_P = torch.cat([self.distances(feature_BD[row], index) for row, index in parts])
        by_P = torch.argsort(index_P, stable=True)
        by_P = by_P[torch.argsort(distance_P[by_P], stable=True)]
        by_P = by_P[torch.argsort(row_P[by_P], stable=True)]
        return row_P[by_P], index_P[by_P], distance_P[by_P]


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
        self.saved = (0, time.monotonic())

    def begin(self, centroid_KD: Tensor) -> None:
        device = self.feature_ND.device
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

    def _move(self, rows: slice | Tensor, old_B: Tensor, new_B: Tensor) -> None:
        """Moves features between the clusters' sums, those whose label has changed; -1 is none."""
        changed = (old_B != new_B).nonzero()[:, 0]
        if not len(changed):
            return
        x_BD = self.feature_ND[rows][changed].double().add_(self.rounder).sub_(self.rounder)
        for label_B, sign in ((old_B[changed], -1), (new_B[changed], 1)):
            some = (label_B >= 0).nonzero()[:, 0]
            if len(some):
                by = torch.argsort(label_B[some], stable=True)
                each_K = torch.bincount(label_B[some], minlength=self.count)
                begin_K = each_K.cumsum(0) - each_K
                self.sum_KD.add_(F.embedding_bag(some[by], x_BD, begin_K, mode="sum"), alpha=sign)
                self.count_K.add_(each_K, alpha=sign)

    @torch.no_grad()
    def step(self) -> None:
        """One pass: labels, then centroids."""
        search, label_N = _Search(self.centroid_KD), torch.empty_like(self.label_N)
        for part in self._parts():
            label_N[part] = search.labels(self.feature_ND[part])
            self._move(part, self.label_N[part], label_N[part])
        moved = self._fill(search, label_N)
        changed = int((label_N != self.label_N).sum())
        full_K = self.count_K > 0
        mean_KD = (self.sum_KD / self.count_K.clamp(min=1)[:, None]).float()
        self.centroid_KD = torch.where(full_K[:, None], mean_KD, self.centroid_KD)
        self.label_N, self.passes = label_N, self.passes + 1
        self.settled = not changed
        self.report(
            f"k-means: pass {self.passes}, {changed} labels changed" + (f", {moved} clusters refilled" * (moved > 0))
        )

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
    """Rows at a time: as many as keep the scores in the cache of a CPU, and a GPU busy."""
    if feature_ND.device.type == "cuda":
        rows = max(256, 2**27 // max(count, feature_ND.shape[1]))
    else:
        rows = min(4096, max(256, 2**19 // max(count, feature_ND.shape[1])))
    for at in range(0, len(feature_ND), rows):
        yield slice(at, at + rows)


def _survey(feature_ND: Tensor) -> tuple[float, int]:
    """The unit to which features are rounded in sums, and a checksum."""
    largest, checksum = 0.0, 0
    for part in _chunks(feature_ND, 1):
        x_BD = feature_ND[part]
        low, high = (float(v) for v in torch.aminmax(x_BD))
        if not math.isfinite(high - low):
            at = part.start + int((~x_BD.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"the features to cluster are not finite numbers, the first at index {at}")
        largest = max(largest, -low, high)
        checksum = (checksum + _checksum(x_BD, part.start)) % 2**63
        interrupts.check()
    bits = math.frexp(largest)[1] + math.ceil(math.log2(max(2, len(feature_ND))))
    return 2.0 ** (bits - 52), checksum


def _checksum(x_BD: Tensor, first: int) -> int:
    """Of the bits; rows and columns have weights of their own. Sums of whole numbers, modulo 2**64, in any order."""
    bits_BD = x_BD.contiguous().view(torch.int32 if x_BD.dtype == torch.float32 else torch.int16)
    weight_D, weight_B = (torch.arange(n, device=x_BD.device) * 2 + 1 for n in reversed(x_BD.shape))
    return int((((bits_BD * weight_D).sum(1)) * (weight_B + 2 * first)).sum())


def _sums(x_PD: Tensor) -> Tensor:
    """Sums of the rows of float64 [P, D], by halves, so that the order depends on D alone; destroys ``x_PD``."""
    while (size := x_PD.shape[1]) > 1:
        half = size // 2
        x_PD[:, :half] += x_PD[:, size - half :]
        x_PD = x_PD[:, : size - half]
    return x_PD[:, 0].clone()


def _whole_numbers(x_SD: Tensor) -> Tensor:
    """Features less their mean, as whole numbers so small that squared distances are exact in float64: [S, D]."""
    whole_SD = x_SD.double()
    whole_SD -= _sums(whole_SD.T.contiguous()) / len(whole_SD)
    bits = (51 - math.ceil(math.log2(max(2, whole_SD.shape[1])))) // 2
    return whole_SD.mul_(2.0 ** (bits - math.frexp(float(whole_SD.abs().max()))[1])).round_()
