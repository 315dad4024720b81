"""Every row small: one epoch of two steps on made-up data, to see that it runs. Its figures mean nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..files import write_text, write_whole
from ..loaders import open_dataset
from ..loaders.tiny import write_tiny
from ..models import build_backbone
from ..recipe import Recipe, Source
from .definition import Row
from .recipes import IMAGENET_FILES, KINETICS, Place

_SIDE, _BATCH, _STEPS, _WIDTH_3D, _VAL_SHARE = 32, 4, 2, 0.125, 0.5
# training samples a class of the tiny data sets, half of which validate; elsewhere 2
_SAMPLES = {"imagenet": 4, "places365": 4, "ucf101": 8, "hmdb51": 8}
_TRAINED = "fasttrain"


def set_the_stage(rows: list[Row], root: Path) -> Place:
    """Writes what the rows need into ``root``: tiny data sets in the official formats, and pretrained weights that are random
    but in the layouts of their publishers. What is there already is kept."""
    place = Place(root, root / "data", root / "weights")
    assert place.data is not None and place.weights is not None
    for name in dict.fromkeys(row.data for row in rows):
        root, path = place.data / name, place.data / f"{name}.txt"
        write_tiny(name, root, samples=_SAMPLES.get(name, 2))
        if not path.is_file():
            train_N = open_dataset(name, root, val_share=_VAL_SHARE, verify=False).splits["train"]
            chosen = train_N[np.linspace(0, len(train_N) - 1, _BATCH * _STEPS).round().astype(int)]
            write_text(path, "\n".join(map(str, chosen.tolist())) + "\n")
    for model in dict.fromkeys(
        row.model for row in rows if not row.clips and (row.finetune or row.method == "teacher")
    ):
        path = place.weights / IMAGENET_FILES[model]
        if not path.is_file():
            import torchvision  # slow to import

            _save(path, torchvision.models.get_model(model, weights=None).state_dict())
    path = place.weights / KINETICS
    if any(row.clips and row.finetune for row in rows) and not path.is_file():
        backbone = build_backbone("resnet3d18", width=_WIDTH_3D)
        tensors = backbone.state_dict() | {
            "fc.weight": torch.zeros(400, backbone.feature_dim),
            "fc.bias": torch.zeros(400),
        }
        _save(path, {"arch": "resnet-18", "state_dict": {f"module.{k}": v for k, v in tensors.items()}})
    return place


def shrunk(recipe: Recipe, place: Place) -> Recipe:
    """The same recipe of small images, narrow networks and random sources of the same classes."""
    clips, data = recipe.data.frames > 0, recipe.data
    assert place.data is not None
    small = replace(
        data,
        verify=False,
        val_share=_VAL_SHARE,
        indices=str(place.data / f"{data.name}.txt"),
        frames=4 if clips else 0,
        clips=1,
        loader="video" if clips else "torch" if data.crop == "random_resized" else "resident",
        workers=1 if clips else 0,
        size=_SIDE,
        batch=_BATCH,
    )
    peers = recipe.method.peers and [recipe.target.model if clips else "timm:test_resnet"]
    return replace(
        recipe,
        data=small,
        target=replace(recipe.target, width=_WIDTH_3D if clips else 1.0),
        sources=[_small(source) for source in recipe.sources],
        transfer=replace(recipe.transfer, width=16, still=_SIDE if recipe.transfer.still else 0),
        method=replace(recipe.method, peers=peers),
        optim=replace(recipe.optim, epochs=1),
        run=replace(recipe.run, tensorboard=False, compile=False),
    )


def tidy(folder: Path, row: Row) -> None:
    """Removes a finished run's checkpoints, but for a teacher's weights: of all rows they are many gigabytes."""
    for path in (folder / "checkpoints").glob("*.pt"):
        if row.method != "teacher" or path.name == "last.pt":
            path.unlink()


def _small(source: Source) -> Source:
    if source.model == _TRAINED:
        return replace(source, size=_SIDE)
    return replace(source, size=_SIDE, model="timm:test_resnet", weights="random", sha256="")


def _save(path: Path, content: dict) -> None:
    write_whole(path, lambda file: torch.save(content, file))
