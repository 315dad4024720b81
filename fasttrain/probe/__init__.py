"""How good the features of each stage of a trained backbone are for labelled data: a linear classifier on every one of them.

As in Zhang et al. 2016 (Colorful Image Colorization, section 3.2) and Noroozi et al. 2018: the backbone is frozen, and each
stage's map is average-pooled to some 9,000 numbers at most.

Shape suffixes: N samples, F chunk, D features, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.build import loader_workers, open_data
from fasttrain.device import choose_device
from fasttrain.environment import environment
from fasttrain.files import write_json
from fasttrain.loaders import Dataset, choose_loader, open_loader
from fasttrain.models import build_backbone
from fasttrain.pretext.features import StageFeatures, Trunk, collect, open_trunk, whole_images
from fasttrain.recipe import Recipe, from_dict
from fasttrain.samples import own_labels, training_indices
from fasttrain.tasks import TASKS, Task

from .logistic import Classifier, Standard, fit

L2 = tuple(10.0**-e for e in range(1, 8))
"""The weights of the L2 penalty that are tried, the largest first."""
MOST_FEATURES = 9000
"""Numbers to which a stage's map is pooled at most."""

__all__ = ["L2", "MOST_FEATURES", "Classifier", "Standard", "fit", "probe", "table"]

Figures = dict[str, float]


@dataclass(frozen=True)
class _Split:
    """What the classifiers see of a split: float32 [N, D] of each layer, on the host, and the labels."""

    feature: list[Tensor]
    targets: Tensor


@dataclass(frozen=True)
class _Ground:
    """What both networks are probed on."""

    recipe: Recipe
    dataset: Dataset
    index: dict[str, np.ndarray]
    task: Task
    metric: str
    device: torch.device


def probe(
    name: str,
    overrides: Sequence[str] = (),
    *,
    split: str = "test",
    labelled: int = 0,
    layers: Sequence[int] | None = None,
    seeds: int = 1,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Linear classifiers on the stages of a run's backbone, and on those of one with random weights.

    The labels are the data set's own, whatever the run has learned from. Of a run's folder, figures on test are written to
    ``probe.json`` in it as well, with the fields that differ from the run's recipe and the machine.

    Args:
        name: a run's folder or a checkpoint.
        overrides: fields that differ from the run's recipe, such as ``["--data.name", "stl10"]``.
        split: ``test``, or ``val``, on which the L2 penalties are chosen; the test images are then not looked at.
        labelled: training images whose labels are used; 0: as many as ``data.labelled`` says.
        layers: stages, 1 for the first, 0 for what the network pools for its head; None: all of them, that one last.
        seeds: random networks to compare with, of the seeds 0, 1, ..
        report: takes a line on what is being done.

    Returns:
        ``{"run", "sha256", "data", "split", "images", "labelled", "metric", "chance", "rows"}``; a row is ``{"layer", "name",
        "features", "l2", "val": figures, "test": figures, "random": figures on ``split``, "random_l2": [..], "random_val"}``,
        without ``test`` for split ``val``. The figures of several random networks are means, and their standard deviations
        are ``random_std``.

    Raises:
        ValueError: no such run, one on clips, a stage that it does not have, or data that cannot be opened.
    """
    if split not in ("test", "val"):
        raise ValueError(f"--split is test or val, not {split!r}")
    for option, value, least in (("--labelled", labelled, 0), ("--seeds", seeds, 1)):
        if value < least:
            raise ValueError(f"{option}: {value} is below {least}")
    trunk = open_trunk(name, "probe")
    count = len(trunk.backbone.tap_channels)
    layers = [*range(1, count + 1), 0] if layers is None else list(layers)
    for layer in layers:
        if not 0 <= layer <= count:
            raise ValueError(f"--layers: {layer}, but {trunk.backbone.name} has stages 1 to {count} (0: what it pools)")
    recipe = _real_labels(trunk, overrides, labelled)
    trunk.backbone.check_size(recipe.data.size, recipe.data.size)
    ground = _ground(recipe, split)
    report(f"{trunk.path}: features of {' + '.join(f'{len(i):,}' for i in ground.index.values())} images")
    rows = _rows(trunk, layers, ground)
    random: list[list[dict[str, Any]]] = []
    for seed in range(seeds):
        report(f"random weights, seed {seed}")
        random.append(_rows(_random(trunk, seed), layers, ground))
    content = {
        "run": name,
        "sha256": trunk.sha256,
        "data": ground.dataset.name,
        "split": split,
        "images": {k: len(v) for k, v in ground.index.items()},
        "labelled": len(ground.index["train"]),
        "metric": ground.metric,
        "chance": _chance(ground, split),
        "rows": [row | _over_seeds([r[i] for r in random], split) for i, row in enumerate(rows)],
    }
    if Path(name).is_dir() and split == "test":
        changed = {"overrides": _changes(asdict(trunk.recipe), asdict(recipe))}
        write_json(Path(name) / "probe.json", content | changed | environment())
    return content


def _real_labels(trunk: Trunk, overrides: Sequence[str], labelled: int) -> Recipe:
    """The run's recipe with other fields as asked, and the data set's own labels and splits in the place of any others."""
    content = asdict(trunk.recipe)
    if own_labels(trunk.recipe):
        content["data"]["indices"] = None  # of images that were learned from without their labels
    content["target"]["classes"] = 0
    recipe = from_dict(content, list(overrides))
    # the paper's protocol has the test split in the place of validation
    recipe.pretext.task, recipe.data.labels, recipe.run.protocol = "none", None, "validation"
    recipe.data.labelled = labelled or recipe.data.labelled
    if recipe.data.frames:
        raise ValueError(f"data.frames: {recipe.data.frames}, but {trunk.backbone.name} sees images; set it to 0")
    return recipe


def _ground(recipe: Recipe, split: str) -> _Ground:
    dataset = open_data(recipe)
    index = {"train": training_indices(recipe, dataset), "val": dataset.splits["val"]}
    if split == "test":
        index["test"] = dataset.splits["test"]
    task = TASKS["multi_label" if dataset.multi_label else "single_label"](len(dataset.classes), 0.0)
    metric = task.metric(torch.from_numpy(dataset.targets_N[index["val"]]))
    return _Ground(recipe, dataset, index, task, metric, choose_device(recipe.run.device))


def _random(trunk: Trunk, seed: int) -> Trunk:
    """The same network with the weights that it starts from, shown images as the trained one is."""
    made = trunk.recipe.target
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(made.model, shortcut=made.shortcut, width=made.width)
    backbone.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return replace(trunk, backbone=backbone)


def _network(trunk: Trunk, layers: Sequence[int]) -> StageFeatures:
    """With each map pooled to the largest square that keeps it within :data:`MOST_FEATURES`."""
    channels = trunk.backbone.tap_channels
    sides = [max(int((MOST_FEATURES / channels[i - 1]) ** 0.5), 1) if i else 1 for i in layers]
    return StageFeatures(trunk, layers, pool=sides, average=True)


def _rows(trunk: Trunk, layers: Sequence[int], ground: _Ground) -> list[dict[str, Any]]:
    """Of each layer: its features, the L2 penalty chosen on the validation images, and figures."""
    network = _network(trunk, layers).to(ground.device)
    splits = {name: _seen(network, trunk, index_N, ground) for name, index_N in ground.index.items()}
    network.cpu()
    return [_row(layer, [(s.feature.pop(0), s.targets) for s in splits.values()], ground) for layer in layers]


def _seen(network: StageFeatures, trunk: Trunk, index_N: np.ndarray, ground: _Ground) -> _Split:
    """One pass over a split's images, in evaluation's views. float32, whatever the run was trained in."""
    data, device = ground.recipe.data, ground.device
    spec = whole_images(index_N, ground.dataset, data, data.on_bad_sample)
    name = choose_loader(spec, device)[0] if data.loader == "auto" else data.loader
    loader = open_loader(name, spec, device, loader_workers(ground.recipe), hw_decoder_load=data.hw_decoder_load)
    feature: list[Tensor] = []
    served_N = np.empty_like(index_N)
    at = 0
    for index_F, layers in collect(network, loader, trunk.recipe, device, torch.float32):
        feature = feature or [torch.empty(len(index_N), f.shape[1]) for f in layers]
        end = at + len(index_F)
        served_N[at:end] = index_F.cpu().numpy()
        for whole_ND, chunk_FD in zip(feature, layers, strict=True):
            whole_ND[at:end] = chunk_FD
        at = end
    assert at == len(index_N)
    return _Split(feature, torch.from_numpy(ground.dataset.targets_N[served_N]))


def _row(layer: int, splits: list[tuple[Tensor, Tensor]], ground: _Ground) -> dict[str, Any]:
    """Of one layer: features and labels of the splits in the order of ``ground.index``."""
    device, task = ground.device, ground.task
    on_device = [(feature_ND.to(device), targets.to(device)) for feature_ND, targets in splits]
    (train_ND, train_targets), (val_ND, val_targets) = on_device[:2]
    standard = Standard.of(train_ND)
    for feature_ND, _ in on_device:
        standard.apply_(feature_ND)
    best: tuple[float, Classifier, Figures] | None = None
    classifier = None
    for l2 in L2:
        classifier = fit(train_ND, train_targets, task.head_size, l2=l2, start=classifier)
        figures = task.evaluate(classifier(val_ND), val_targets)
        if best is None or _rank(figures, ground.metric) > _rank(best[2], ground.metric):
            best = l2, classifier, figures
    assert best is not None
    row = {
        "layer": layer,
        "name": f"stage {layer}" if layer else "pooled",
        "features": train_ND.shape[1],
        "l2": best[0],
        "val": best[2],
    }
    for test_ND, test_targets in on_device[2:]:
        row["test"] = task.evaluate(best[1](test_ND), test_targets)
    return row


def _rank(figures: Figures, metric: str) -> tuple[float, float]:
    return figures[metric], -figures["loss"]


def _chance(ground: _Ground, split: str) -> float:
    """The metric on a split of always giving the same answer: how often each class is met in training."""
    train = torch.from_numpy(ground.dataset.targets_N[ground.index["train"]])
    targets = torch.from_numpy(ground.dataset.targets_N[ground.index[split]])
    if train.dim() == 1:
        answer_K = torch.bincount(train, minlength=ground.task.classes).double()
    else:
        answer_K = (train > 0).double().sum(0) / (train >= 0).double().sum(0).clamp(min=1)
    return ground.task.evaluate(answer_K.expand(len(targets), -1), targets)[ground.metric]


def _over_seeds(rows: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """Rows of one layer of several random networks, as one."""

    def over(how: Callable[[list[float]], Any], which: str) -> Figures:
        return {figure: float(how([row[which][figure] for row in rows])) for figure in rows[0][which]}

    out: dict[str, Any] = {"random": over(np.mean, split), "random_val": over(np.mean, "val")}
    if len(rows) > 1:
        out["random_std"] = over(partial(np.std, ddof=1), split)
    return out | {"random_l2": [row["l2"] for row in rows]}


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields that differ, such as ``data.name``, and what they are afterwards."""
    out: dict[str, Any] = {}
    for field, value in after.items():
        if isinstance(value, dict) and isinstance(before.get(field), dict) and field != "rows":
            out |= _changes(before[field], value, f"{prefix}{field}.")
        elif value != before.get(field):
            out[f"{prefix}{field}"] = value
    return out


def table(content: dict[str, Any]) -> Any:
    """What :func:`probe` returns as a table for the terminal."""
    from rich.table import Table

    metric, split = content["metric"], content["split"]
    random = "random weights %" + (" (mean ± std)" if "random_std" in content["rows"][0] else "")
    chosen = ", on which L2 was chosen" if split == "val" else ""
    out = Table(
        title=f"{content['run']} on {content['data']}: {content['labelled']:,} labels; {content['images'][split]:,} images of "
        f"the {split} split{chosen}",
        caption=f"always naming the largest class: {content['chance']:.2f} %",
    )
    for name in ("", "features", "L2", f"{metric.replace('_', ' ')} %", random):
        out.add_column(name, justify="left" if not name else "right")
    for row in content["rows"]:
        deviation = f" ± {row['random_std'][metric]:.2f}" if "random_std" in row else ""
        out.add_row(
            row["name"],
            f"{row['features']:,}",
            f"{row['l2']:g}",
            f"{row[split][metric]:.2f}",
            f"{row['random'][metric]:.2f}{deviation}",
        )
    return out
