"""What report.html shows of learning without labels: puzzles as the network saw them, images of clusters, linear probes.

Shape suffixes: B samples, P places of a puzzle, G tiles in a direction, T side of a tile, H W pixels, N images, K classes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fasttrain.build import loader_specs, open_data
from fasttrain.loaders import Dataset
from fasttrain.recipe import Recipe
from fasttrain.saliency import SAMPLES, answers, as_evaluated

from .data import with_given_labels
from .labels import read_labels

CLUSTERS, NEAREST = 8, 8  # lines of a picture, and images in each
_GAP = 0.08  # between tiles, in their sides


# puzzles


@dataclass(frozen=True)
class Solved:
    """A puzzle, and what a network says of it.

    Attributes:
        picture_HW3: uint8, the image.
        puzzle_HW3: uint8, its tiles as they were laid out, white between them.
        right: whether the network tells the order.
        said: the same in words, with the probability of the network's answer.
    """

    picture_HW3: np.ndarray
    puzzle_HW3: np.ndarray
    right: bool
    said: str


def puzzles(recipe: Recipe, folder: str, dataset: Dataset) -> list[Solved]:
    """The first images of the test split, up to 4: the puzzles of the evaluation, and the answers of a run's selected weights.

    Args:
        recipe: of the run.
        folder: the run's.
        dataset: the recipe's.

    Raises:
        ValueError, OSError, RuntimeError: they cannot be made.
    """
    index_B = dataset.splits["test"][:SAMPLES]  # an even number, so that each has the neighbour of the evaluation
    batch, logits_BK = answers(recipe, folder, dataset, index_B)
    plain = replace(recipe, pretext=replace(recipe.pretext, task="none"))
    picture_BHW3 = as_evaluated(plain, dataset, index_B).pixels.permute(0, 2, 3, 1).cpu().numpy()
    tile_BPTT3 = batch.pixels.permute(0, 2, 3, 4, 1).cpu().numpy()
    share_B, answer_B = logits_BK.softmax(1).max(1)
    right_B = (answer_B == batch.targets.cpu()).tolist()
    return [
        Solved(
            picture,
            laid_out(tiles, recipe.pretext.grid),
            right,
            f"{'right' if right else 'wrong'}, {100 * share:.0f} %",
        )
        for picture, tiles, right, share in zip(picture_BHW3, tile_BPTT3, right_B, share_B.tolist(), strict=True)
    ]


def laid_out(tile_PTT3: np.ndarray, grid: int) -> np.ndarray:
    """Tiles in rows, white between them: uint8 [H, W, 3]."""
    side = tile_PTT3.shape[1]
    step = side + max(1, round(_GAP * side))
    out_HW3 = np.full((step * grid - (step - side),) * 2 + (3,), 255, dtype=np.uint8)
    for place, tile_TT3 in enumerate(tile_PTT3):
        top, left = place // grid * step, place % grid * step
        out_HW3[top : top + side, left : left + side] = tile_TT3
    return out_HW3


# clusters


@dataclass(frozen=True)
class Cluster:
    """The images that lie nearest to a centroid.

    Attributes:
        title: the cluster's number, how many images it has, and what they show.
        strip_HW3: uint8, the images side by side, nearest first; white where there are no more.
    """

    title: str
    strip_HW3: np.ndarray


def clusters(recipe: Recipe) -> list[Cluster]:
    """Up to 8 of the clusters whose numbers a run learned, from the largest to the smallest, evenly by rank, of those with at
    least 8 training images (of all with any, where fewer than 8 clusters have as many).

    Args:
        recipe: of the run.

    Raises:
        ValueError, OSError, RuntimeError: they cannot be made.
    """
    recipe = replace(recipe, data=replace(recipe.data, verify=False), target=replace(recipe.target, classes=0))
    made, given = read_labels(recipe), with_given_labels(recipe)
    dataset = open_data(given)
    index_N = loader_specs(recipe, dataset)[0].index_N  # what the run learned from
    label_N, distance2_N = made.label_N[index_N], made.distance2_N[index_N]
    chosen = chosen_clusters(np.bincount(label_N, minlength=made.count))
    members = [index_N[label_N == k] for k in chosen]
    nearest = [
        its[np.argsort(distance2_N[label_N == k], kind="stable")[:NEAREST]]
        for k, its in zip(chosen, members, strict=True)
    ]
    pixels = as_evaluated(
        replace(given, target=replace(given.target, classes=0)), dataset, np.concatenate(nearest)
    ).images
    picture_BHW3 = pixels.permute(0, 2, 3, 1).cpu().numpy()
    out, at = [], 0
    for k, its, shown in zip(chosen, members, nearest, strict=True):
        strip = _strip(picture_BHW3[at : at + len(shown)], NEAREST)
        out.append(Cluster(f"cluster {k}: {len(its)} images{_mostly(dataset, its)}", strip))
        at += len(shown)
    return out


def chosen_clusters(count_K: np.ndarray) -> list[int]:
    """Numbers of up to 8 clusters with so many images each; see :func:`clusters`."""
    order_K = np.argsort(-count_K, kind="stable")
    fit_K = order_K[count_K[order_K] >= NEAREST]
    if len(fit_K) < CLUSTERS:
        fit_K = order_K[count_K[order_K] > 0]
    place_L = np.linspace(0, len(fit_K) - 1, min(CLUSTERS, len(fit_K))).round().astype(int)
    return fit_K[place_L].tolist()


def _strip(picture_BHW3: np.ndarray, count: int) -> np.ndarray:
    height, width = picture_BHW3.shape[1:3]
    step = width + max(1, round(_GAP * width))
    out_HW3 = np.full((height, step * count - (step - width), 3), 255, dtype=np.uint8)
    for i, picture_HW3 in enumerate(picture_BHW3):
        out_HW3[:, i * step : i * step + width] = picture_HW3
    return out_HW3


def _mostly(dataset: Dataset, index_N: np.ndarray) -> str:
    """The share of the class that most of the images show, by the data set's own labels."""
    targets_N = dataset.targets_N[index_N]
    shown_K = (targets_N > 0).sum(0) if dataset.multi_label else np.bincount(targets_N, minlength=len(dataset.classes))
    most = int(shown_K.argmax())
    return f", {100 * shown_K[most] / len(index_N):.0f} % {dataset.classes[most]}"


# linear probes


@dataclass(frozen=True)
class Probe:
    """Figures of linear classifiers on a network's stages, in percent.

    Attributes:
        metric: which figure.
        data: name of the data set.
        labelled: images that the classifiers learned from.
        chance: what always giving the same answer reaches.
        stages: names, in their order.
        test, random: by stage: of the run's network, and of the same with random weights.
    """

    metric: str
    data: str
    labelled: int
    chance: float
    stages: Sequence[str]
    test: dict[str, float]
    random: dict[str, float]

    @property
    def measured(self) -> tuple[str, str, int, float]:
        """Probes in which this is the same can be compared."""
        return self.metric, self.data, self.labelled, self.chance

    def words(self) -> str:
        """What was measured."""
        return (
            f"{self.metric.replace('_', ' ')} % on the test split of {self.data}, of a linear classifier on the frozen features "
            f"of each stage, learned from {self.labelled:,} labelled images: of each row's first seed, beside the same network "
            f"with random weights. Always giving the same answer reaches {self.chance:.2f} %."
        )


def read_probe(folder: Path) -> Probe | None:
    """What `fasttrain probe` has left in a run's folder; None if nothing.

    Raises:
        ValueError, OSError: a file that it did not write.
    """
    path = folder / "probe.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        metric, rows = content["metric"], content["rows"]
        test, random = ({row["name"]: float(row[k][metric]) for row in rows} for k in ("test", "random"))
        stages = [row["name"] for row in rows]
        return Probe(metric, content["data"], content["labelled"], float(content["chance"]), stages, test, random)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what `fasttrain probe` writes ({type(error).__name__}: {error})") from None
