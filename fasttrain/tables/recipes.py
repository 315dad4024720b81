"""A row of the paper -> its recipe. What the paper says and where it is silent: docs/paper.md."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..ranges import check
from ..recipe import Data, Method, Optim, Recipe, Run, Source, Target, Transfer, all_fields, from_dict
from .definition import Row

CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10, "places365": 365, "imagenet": 1000, "voc": 20}
CLASSES |= {"ucf101": 101, "hmdb51": 51}
KINETICS = "resnet-18-kinetics.pth"  # Hara et al.'s
PLACES = "resnet50_places365.pth.tar"  # CSAIL's
IMAGENET = "IMAGENET1K_V1"  # torchvision's name, and the files that it fetches by it
IMAGENET_FILES = {"resnet18": "resnet18-f37072fd.pth", "resnet50": "resnet50-0676ba61.pth"}

_SMALL: dict[str, Any] = {
    "data": {"crop": "pad", "pad": 4},
    "transfer": {"every_view": True},
    "optim": {"epochs": 200, "lr": 0.1, "weight_decay": 5e-4, "milestones": [60, 120, 160, 200]},
}
_LARGE: dict[str, Any] = {
    "data": {"size": 224, "crop": "random_resized", "min_area": 0.08, "centre_share": 0.875},
    "optim": {"epochs": 90, "lr": 0.1, "weight_decay": 1e-4, "milestones": [30, 60, 90]},
}
_CLIPS: dict[str, Any] = {
    # ActivityNet's mean, and no scale: what the published code and its checkpoints have
    "data": {"frames": 16, "size": 112, "crop": "corner", "mean": [114.7748, 107.7354, 99.475], "std": [1, 1, 1]},
    "target": {"shortcut": "A"},
    "transfer": {"still": 224},
    "optim": {"epochs": 200, "lr": 0.1, "dampening": 0.9, "weight_decay": 1e-3, "gamma": 0.1, "patience": 10},
}
_CLIPS["optim"]["schedule"] = "plateau"
# data set -> the fields in which its recipes differ from the defaults, the former ones first (Table 1)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "cifar10": [_SMALL, {"data": {"size": 32}, "optim": {"epochs": 350, "milestones": [150, 250, 350]}}],
    "cifar100": [_SMALL, {"data": {"size": 32}}],
    "stl10": [_SMALL, {"data": {"size": 96}}],
    "places365": [_LARGE],
    "imagenet": [_LARGE],
    "voc": [_LARGE, {"data": {"views": 90}}],  # as many as epochs: new ones always, and labels that all rows share
    "ucf101": [_CLIPS, {"data": {"views": 200}}],
    "hmdb51": [_CLIPS, {"data": {"views": 200}}],
}
_FINE_TUNED: dict[str, Any] = {"optim": {"lr": 0.01}}
_TEACHER: dict[str, Any] = {"data": {"size": 224}, "optim": {"epochs": 30, "lr": 0.01, "milestones": [10, 20]}}
_SOURCES = {"P": "places", "I": "imagenet"}


@dataclass(frozen=True)
class Place:
    """Where data and weights are looked for, and runs are kept.

    Attributes:
        runs: folder of all rows' runs.
        data: folder with one folder, or packed file ``NAME.beton``, a data set; None where nobody has said.
        weights: folder of weights files.
    """

    runs: Path
    data: Path | None
    weights: Path | None

    def packed(self, name: str) -> Path | None:
        """The data set's packed file, if it is there."""
        path = self.data / f"{name}.beton" if self.data else None
        return path if path and path.is_file() else None

    def file(self, name: str) -> str:
        """Where a weights file is, or ought to be."""
        return str(self.weights / name) if self.weights else name

    def imagenet(self, model: str) -> dict[str, str]:
        """The file of torchvision's weights where it lies among the others, else their name and the digits in the file's."""
        path = Path(self.file(IMAGENET_FILES[model]))
        digits = path.stem.rpartition("-")[2]
        return {"weights": str(path)} if path.is_file() else {"weights": IMAGENET, "sha256": digits}

    def folder(self, row: Row, seed: int) -> Path:
        """Of a run."""
        return self.runs / row.id / f"seed{seed}"

    def missing(self, row: Row) -> str:
        """What a row needs and is not there, in words; empty if all of it is."""
        if self.data is None:
            return "needs --data-root"
        if not (self.data / row.data).is_dir() and not self.packed(row.data):
            return f"no data: there is neither {self.data / row.data} nor {self.data / row.data}.beton"
        names = ([PLACES] if "P" in row.sources else []) + ([KINETICS] if row.clips and row.finetune else [])
        lost = [self.file(name) for name in names if not Path(self.file(name)).is_file()]
        return f"no weights: there is no {' and no '.join(lost)}" if lost else ""


def recipe_of(row: Row, place: Place, *, seed: int = 0) -> Recipe:
    """A row's recipe.

    Args:
        row: of the paper, or a teacher.
        place: of data, weights and runs.
        seed: ``run.seed``.
    """
    content: dict[str, Any] = {"name": row.id.replace("/", "-"), "run": {"dir": str(place.runs), "seed": seed}}
    packed, model = place.packed(row.data), row.model
    root = packed or (place.data / row.data if place.data else None)
    content["data"] = {"name": "beton" if packed else row.data, "root": str(root) if root else None}
    content["target"] = {"model": model}
    for more in SETTINGS[row.data]:
        merge(content, more)
    if row.finetune:
        merge(content, _FINE_TUNED)
        content["target"] |= {"weights": place.file(KINETICS)} if row.clips else place.imagenet(model)
    merge(content, _METHODS[row.method](row, place))
    return _made(content)


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with some fields set (nested).

    Raises:
        ValueError: a value that is not right.
    """
    groups = {k: replace(getattr(recipe, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    out = replace(recipe, **groups)
    check(out)
    return out


def changes_of(overrides: list[str]) -> dict[str, Any]:
    """Fields as on the command line (``["--optim.lr", "0.05"]``) -> nested.

    Raises:
        ValueError: a field that does not exist, or a value that is not right.
    """
    if not overrides:
        return {}
    names = [given.removeprefix("--").partition("=")[0] for given in overrides if given.startswith("--")]
    parsed, out = from_dict({}, overrides), dict[str, Any]()
    for name in names:
        if name not in all_fields():
            raise ValueError(f"--{name} is no single field of a recipe; set fields one by one, such as --optim.lr 0.05")
        group, _, key = name.partition(".")
        if key:
            merge(out, {group: {key: getattr(getattr(parsed, group), key)}})
        else:
            out[name] = getattr(parsed, name)
    return out


def _made(content: dict[str, Any]) -> Recipe:
    """The recipe of these fields; :func:`fasttrain.recipe.from_dict` takes a quarter of a second for each."""
    groups = {"data": Data, "target": Target, "transfer": Transfer, "method": Method, "optim": Optim, "run": Run}
    fields = {name: kind(**content.get(name, {})) for name, kind in groups.items()}
    out = Recipe(name=content["name"], sources=[Source(**s) for s in content.get("sources", [])], **fields)
    check(out)
    return out


def _scratch(row: Row, place: Place) -> dict[str, Any]:
    return {"method": {"name": "scratch"}}


def _sskt(row: Row, place: Place) -> dict[str, Any]:
    sources = [
        {"name": "imagenet", "model": "torchvision:resnet50", **place.imagenet("resnet50")},
        {"name": "places", "model": "torchvision:resnet50", "weights": place.file(PLACES), "classes": 365},
    ]
    transfer = {"sources": [_SOURCES[letter] for letter in row.sources], "module": row.module, "loss": row.loss}
    return {
        "sources": sources,
        "transfer": transfer | {"temperature": row.temperature, "alpha": row.alpha},
        "method": {"name": "sskt"},
    }


def _kd(row: Row, place: Place) -> dict[str, Any]:
    assert row.teacher is not None
    source: dict[str, Any] = {"name": "teacher", "model": "fasttrain", "weights": str(place.folder(row.teacher, 0))}
    source |= {"classes": CLASSES[row.data], "size": _TEACHER["data"]["size"]}
    return {"sources": [source], "method": {"name": "kd", "temperature": 4.0, "weight": 0.9}}


def _dml(row: Row, place: Place) -> dict[str, Any]:
    return {"method": {"name": "dml", "peers": ["resnet3d50" if row.clips else "resnet50"]}}


def _teacher(row: Row, place: Place) -> dict[str, Any]:
    return _TEACHER | {"target": place.imagenet(row.model), "method": {"name": "scratch"}}


_METHODS = {"scratch": _scratch, "sskt": _sskt, "kd": _kd, "dml": _dml, "teacher": _teacher}


def merge(content: dict[str, Any], changes: dict[str, Any]) -> None:
    """Sets nested fields; a field that is no dict is set whole."""
    for key, value in changes.items():
        if isinstance(value, dict):
            merge(content.setdefault(key, {}), value)
        else:
            content[key] = value
