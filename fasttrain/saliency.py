"""What target and sources look at in a few test samples, as in Fig. 1 of the SSKT paper: the columns of a picture.

Shape suffixes: B samples, H W pixels.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint, gradcam
from .build import build_target, loader_specs
from .device import choose_device
from .inference import open_run
from .kernels import network_input
from .loaders import Batch, ClipPlan, Dataset, open_loader
from .models import Target
from .pretext.source import CLUSTERS, ClusterLogits, open_clusters
from .recipe import Recipe, Source
from .sources import open_source
from .trained import TRAINED, open_trained

SAMPLES = 4
WHY_NOT = (ValueError, OSError, RuntimeError)  # no such weights, no map in the network, no memory left, ..


@dataclass(frozen=True)
class Column:
    """What one network sees, and where it looks.

    Attributes:
        title: whose it is.
        picture_BHW3: uint8, its input (of a clip, the middle frame).
        cam_BHW: Grad-CAM at the picture's size, 0 and above.
        said: of each sample, what the network says.
    """

    title: str
    picture_BHW3: np.ndarray
    cam_BHW: np.ndarray
    said: list[str]


def chosen_samples(dataset: Dataset) -> np.ndarray:
    """The first samples of the test split, of as many classes as can be: int64 indices [B], of up to 4.

    Of a multi-label data set a sample counts to the first class that it shows; samples that show none are left out.
    """
    index_N, label_N = dataset.splits["test"], labels(dataset, dataset.splits["test"])
    turn_N = np.empty(len(index_N), dtype=np.int64)  # how many of the class came before
    for label in np.unique(label_N):
        turn_N[label_N == label] = np.arange((label_N == label).sum())
    order_N = np.argsort(turn_N, kind="stable")
    return index_N[order_N[label_N[order_N] >= 0][:SAMPLES]]


def labels(dataset: Dataset, index_B: np.ndarray) -> np.ndarray:
    """The samples' classes, of a multi-label data set the first that is shown, -1 for none: int64 [B]."""
    targets_B = dataset.targets_N[index_B]
    if not dataset.multi_label:
        return targets_B
    return np.where((targets_B > 0).any(1), (targets_B > 0).argmax(1), -1)


def target_column(title: str, recipe: Recipe, folder: str, dataset: Dataset, index_B: np.ndarray) -> Column:
    """Of a run's selected weights, for the samples' own classes.

    Args:
        title: what to call it.
        recipe: of the run.
        folder: the run's.
        dataset: the recipe's.
        index_B: int64, which samples.

    Raises:
        ValueError, OSError, RuntimeError: it cannot be made.
    """
    batch, (target, x) = _asked(recipe, folder, dataset, index_B)
    own_B = torch.from_numpy(labels(dataset, index_B)).to(x.device)
    found = gradcam.explain(target, x, own_B)
    if dataset.multi_label:
        share_B = found.logits_BK.gather(1, own_B[:, None])[:, 0].sigmoid().tolist()
        said = [f"{dataset.classes[k]} {_percent(p)}" for k, p in zip(own_B.tolist(), share_B, strict=True)]
    else:
        said = _best(found.logits_BK, dataset.classes)
    return _column(title, batch.images, found.cam, said, recipe.data.frames)


def answers(recipe: Recipe, folder: str, dataset: Dataset, index_B: np.ndarray) -> tuple[Batch, Tensor]:
    """The samples as they are evaluated, and what a run's selected weights make of them: logits, float32 [B, K], on the CPU.

    Args:
        recipe, folder, dataset, index_B: as for :func:`target_column`.

    Raises:
        ValueError, OSError, RuntimeError: there are none.
    """
    batch, (target, x) = _asked(recipe, folder, dataset, index_B)
    with torch.no_grad():
        return batch, target(x).logits_BK.float().cpu()


def source_column(source: Source, recipe: Recipe, dataset: Dataset, index_B: np.ndarray) -> Column:
    """Of a source, for the class that it names itself, on what it sees of the samples.

    Args:
        source: one of the recipe's.
        recipe, dataset, index_B: as for :func:`target_column`.

    Raises:
        ValueError, OSError, RuntimeError: it cannot be made.
    """
    device, batch = choose_device(recipe.run.device), as_evaluated(recipe, dataset, index_B)
    shown = batch.images if batch.still is None else batch.still
    frozen = replace(source, batch_norm="eval")
    if source.model == CLUSTERS:
        network = open_clusters(frozen, recipe).to(device)
    else:
        network = (open_trained(frozen) if source.model == TRAINED else open_source(frozen)).to(device)
    x_BCHW = network_input(shown.to(device), network.mean, network.std, size=source.size)  # type: ignore[arg-type]
    explain = _of_clusters if source.model == CLUSTERS else gradcam.explain
    found = explain(network.network, x_BCHW)
    names = open_run(source.weights)[1]["classes"] if source.model == TRAINED else _names(source)
    return _column(source.name, shown, found.cam, _best(found.logits_BK, names), 0)


def as_evaluated(recipe: Recipe, dataset: Dataset, index_B: np.ndarray) -> Batch:
    """The samples as they are evaluated, of each video one clip from its middle; with the sources' stills, if there are any.

    Args:
        recipe: of the run.
        dataset: the recipe's.
        index_B: int64, which samples, in this order.
    """
    data = recipe.data
    _, evals = loader_specs(recipe, dataset)
    spec = replace(
        evals["test"],
        index_N=index_B,
        on_bad_sample="error",  # another would stand in its place
        batch=len(index_B),
        still=recipe.transfer.still if recipe.chosen_sources() else 0,
        clip=ClipPlan(data.frames, data.stride, clips=1) if data.frames else None,
    )
    with closing(open_loader("video" if data.frames else "torch", spec, workers=0)) as loader:
        return next(iter(loader))


def _asked(recipe: Recipe, folder: str, dataset: Dataset, index_B: np.ndarray) -> tuple[Batch, tuple[Target, Tensor]]:
    """The samples, a run's network, and its input."""
    device, batch = choose_device(recipe.run.device), as_evaluated(recipe, dataset, index_B)
    path, state = open_run(folder)
    target = build_target(recipe, len(dataset.classes), {}, weights=False)
    checkpoint.load_target(target, state, path, dataset.classes)
    target.to(device).eval()
    mean, std = (torch.tensor(v, device=device) for v in (recipe.data.mean, recipe.data.std))
    return batch, (target, network_input(batch.pixels.to(device), mean, std))


def _of_clusters(network: nn.Module, x_BCHW: Tensor) -> gradcam.Explained:
    """Grad-CAM of the stage whose features were clustered, for the nearest centroid."""
    assert isinstance(network, ClusterLogits)
    (layer,), kept = network.features.layers, []

    def cut(module: nn.Module, given, made: tuple[list[Tensor], Tensor]) -> tuple[list[Tensor], Tensor]:
        taps = [*made[0], made[1]]
        kept.append(taps[layer - 1].detach().requires_grad_())  # 0 is the last map, too
        taps[layer - 1] = kept[0]
        return taps[:-1], taps[-1]

    handle = network.features.backbone.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits_BK = network(x_BCHW)
    finally:
        handle.remove()
    if kept[0][0, 0].numel() == 1:
        raise ValueError("the map of its stage has one place only")
    class_B = logits_BK.argmax(1)
    return gradcam.Explained(logits_BK.detach(), class_B, gradcam.grad_cam(kept[0], logits_BK, class_B))


def _column(title: str, pixel_B3HW: Tensor, cam: Tensor, said: list[str], frames: int) -> Column:
    cam_BHW = gradcam.enlarged(cam, size=pixel_B3HW.shape[-1], frames=frames)
    return Column(title, pixel_B3HW.permute(0, 2, 3, 1).cpu().numpy(), cam_BHW.cpu().numpy(), said)


def _best(logits_BK: Tensor, names: Sequence[str]) -> list[str]:
    share_B, class_B = logits_BK.softmax(1).max(1)
    return [f"{names[k]} {_percent(p)}" for k, p in zip(class_B.tolist(), share_B.tolist(), strict=True)]


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.01 else 0}f} %"


@cache
def _names_of_imagenet() -> tuple[str, ...]:
    from timm.data import ImageNetInfo  # slow to import

    known = ImageNetInfo()
    return tuple(known.index_to_description(i).partition(",")[0] for i in range(known.num_classes()))


def _names(source: Source) -> Sequence[str]:
    """Of a source's classes: ImageNet's for trained networks of 1000 classes, else their numbers."""
    if source.model == CLUSTERS:
        return [f"cluster {i}" for i in range(source.classes)]
    if source.classes == 1000 and source.weights != "random":
        return _names_of_imagenet()
    return [f"class {i}" for i in range(source.classes)]
