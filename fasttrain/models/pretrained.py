"""Pretrained weights for a target's backbone.

Files of these layouts fit by name: torchvision's and timm's state dicts; the checkpoints of Hara et al.'s 3D ResNets, old
(``resnet-18-kinetics.pth``) and new (``r3d18_K_200ep.pth``); and our own (``checkpoints/selected.pt``). A file of one of
timm's networks may also hold the same tensors in the same order under other names.
"""

from torch import Tensor

from fasttrain.published import torchvision_weights
from fasttrain.weights import Weights, find_file, is_library_name, read_weights

from .backbone import Backbone
from .timm_backbone import TimmBackbone

_NAMED = 3  # tensors that a message names, of each kind


def load_backbone(backbone: Backbone, spec: str, sha256: str = "") -> str:
    """Loads weights into a backbone; a classifier among them is left out, everything else has to fit.

    Args:
        backbone: by ``build_backbone``.
        spec: a file, ``package:MODULE``, a URL, or the library's name for weights of this network: torchvision's, such as
            ``KINETICS400_V1``, or ``DEFAULT``, of timm too. Files with code in them are refused.
        sha256: the file's SHA-256 or its first digits, to insist on; what is not here is fetched only where it is given.

    Returns:
        What was loaded, with its SHA-256, for the log.

    Raises:
        ValueError: weights that cannot be found, fetched or read, have another SHA-256, or do not fit.
    """
    try:
        if not is_library_name(spec):
            weights = read_weights(find_file(spec, sha256), sha256)
        elif isinstance(backbone, TimmBackbone):
            weights = backbone.published(spec, sha256)
        else:
            if backbone.library != "torchvision":
                raise ValueError(
                    f"{spec!r} is a name of torchvision's, which has no {backbone.name}; give a file or package:MODULE"
                )
            weights = torchvision_weights(backbone.name, spec, sha256)
        given, how = _of_a_target(weights.tensors), "by name"
        if not given:
            given, how = backbone.own_tensors(weights)
    except ValueError as error:
        raise ValueError(f"{'target.weights or target.sha256' if sha256 else 'target.weights'}: {error}") from None
    _insist_on_fit(backbone, given, weights)
    backbone.load_state_dict(given, strict=False)  # strict but for the batch counters, which older files have not
    name = f"{spec} ({weights.origin})" if weights.origin != spec else spec
    return f"{name}, {len(given)} tensors {how}, SHA-256 {weights.sha256}"


def _of_a_target(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a target of ours has before its heads; nothing, where these are another's tensors."""
    return {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}


def _insist_on_fit(backbone: Backbone, given: dict[str, Tensor], weights: Weights) -> None:
    wanted = backbone.state_dict()
    counters = {k for k in wanted if k.endswith("num_batches_tracked")}
    missing = [k for k in wanted if k not in given and k not in counters]
    left = [k for k in given if k not in wanted]
    other = [k for k in given if k in wanted and given[k].shape != wanted[k].shape]
    if not missing and not left and not other:
        return
    shapes = [f"{k} {list(given[k].shape)}, not {list(wanted[k].shape)}" for k in other]
    found = (("missing", missing), ("left over", left), ("of another shape", shapes))
    told = "; ".join(f"{len(names)} tensors are {what}: {_some(names)}" for what, names in found if names)
    raise ValueError(
        f"target.weights: {weights.origin} does not fit target.model: {backbone.name}; {told}{_hint(missing, left)}"
    )


def _hint(missing: list[str], left: list[str]) -> str:
    """Where only the type of the shortcuts differs: which one it is."""
    if left and not missing and all(".downsample." in k for k in left):
        return " (it has weights of shortcuts: target.shortcut B?)"
    if missing and not left and all(".downsample." in k for k in missing):
        return " (it has no weights of shortcuts: target.shortcut A?)"
    return ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", .." if len(names) > _NAMED else "")
