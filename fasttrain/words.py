"""A method and its settings in words, for whatever people read: the report, the model card."""

from pathlib import Path
from typing import Any

from .recipe import Recipe

METHODS = {
    "scratch": "labels alone",
    "sskt": "SSKT: labels, and the soft labels of frozen sources through auxiliary heads",
    "kd": "knowledge distillation (Hinton et al. 2014): labels, and teachers with the same classes",
    "dml": "deep mutual learning (Zhang et al. 2018): labels, and peers trained beside it",
    "maxl": "MAXL (Liu et al. 2019): labels, and sub-classes from a generator that learns which ones help",
}

LABELS = "labels"  # what rows learn that learn what their data set says


def learns(recipe: Recipe) -> str:
    """What a run's classes are: ``labels`` (the data set's), ``order of tiles, N orders`` or ``clusters, K``."""
    if recipe.pretext.task != "none":
        return f"order of tiles, {recipe.pretext.permutations} orders"
    return LABELS if recipe.data.labels is None else f"clusters, {recipe.pretext.clusters}"


def how_learned(recipe: Recipe) -> str:
    """What a run's classes are, and how they are made."""
    pretext, what = recipe.pretext, learns(recipe)
    if pretext.task != "none":
        return (
            f"{what}: {pretext.grid} x {pretext.grid} tiles, up to {pretext.replaced} of them another image's, colours shifted "
            f"by up to {pretext.channel_shift} px, {100 * pretext.grey:g} % grey"
        )
    if recipe.data.labels is None:
        return what
    stage = f"stage {pretext.layer}" if pretext.layer else "the pooled features"
    return f"{what}: k-means of {stage} of {'/'.join(Path(recipe.data.labels).parts[-2:])}"


def rows_by_kind(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """A table's rows by what they learn, whatever the count of the classes: first those that learn their data set's labels."""
    out: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["learns"] != LABELS):
        out.setdefault(row["learns"].partition(",")[0], []).append(row)
    return out


def own_columns(kind: str) -> tuple[str, str] | None:
    """What to call ``classes`` and ``chance`` of rows that make their own labels; None of the data set's."""
    return {"order of tiles": ("orders", "chance %"), "clusters": ("clusters", "largest cluster %")}.get(kind)


def percent(value: float | None) -> str:
    """With two digits; nothing where it is not known."""
    return "" if value is None else f"{value:.2f}"


def method_settings(recipe: Recipe) -> str:
    """What the method's own fields say; empty for one that has none. Sources are not named."""
    method, transfer = recipe.method, recipe.transfer
    if method.name == "sskt":
        width = f"of width {transfer.width}, " if transfer.width else ""
        heads = f"transfer modules ({width}{transfer.combine} of the branches)" if transfer.module else "linear heads"
        loss = "cross entropy" if transfer.loss == "ce" else "divergence"
        loss += " over the class count" if (transfer.loss, transfer.kd_reduction) == ("kd", "mean") else ""
        return f"{heads}; {loss} at T = {transfer.temperature:g}, alpha = {transfer.alpha:g}"
    if method.name == "kd":
        return f"T = {method.temperature:g}, weight {method.weight:g} of 1"
    if method.name == "dml":
        peers = [recipe.target.model] if method.peers is None else method.peers
        weights = [None] * len(peers) if method.peer_weights is None else method.peer_weights
        return "peers " + ", ".join(f"{p} from {place_of(w)}" if w else p for p, w in zip(peers, weights, strict=False))
    if method.name == "maxl":
        return (
            f"generator {method.generator}, lr {method.generator_lr:g}; {method.subclasses} sub-classes of each class, entropy "
            f"{method.entropy:g}; gradient of {method.order} order"
        )
    return ""


def place_of(weights: str) -> str:
    """Where weights are from, without the folders that lead there: a file, or a run."""
    path = Path(weights)
    return path.name if path.name != "selected.pt" else "/".join(path.parent.parent.parts[-2:])
