"""Which values the fields of a recipe may have, and which go together."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports this module
    from .recipe import Recipe

_RANGES: list[tuple[Callable[[float], bool], str, str]] = [
    (
        lambda v: v > 0,
        "is not above 0",
        "data.size data.batch transfer.temperature optim.epochs run.seeds run.parallel run.eval_every run.log_every "
        "run.checkpoint_every run.accumulate run.keep run.timeout transfer.pad_to data.stride data.clips target.width "
        "method.temperature method.subclasses pretext.width pretext.hidden pretext.pool pretext.iterations pretext.softness",
    ),
    (
        lambda v: v >= 0,
        "is below 0",
        "data.labelled data.stored data.grow_from data.pad data.views data.seed data.frames "
        "target.classes target.frozen transfer.alpha "
        "transfer.still transfer.recall_top transfer.recall_gib optim.lr optim.weight_decay optim.warmup_epochs "
        "optim.clip_norm optim.backbone_lr run.seed run.checkpoint_steps run.cosine_every run.skip_nonfinite "
        "transfer.width method.entropy method.generator_lr method.generator_weight_decay "
        "pretext.tile pretext.channel_shift pretext.replaced pretext.layer",
    ),
    (lambda v: v > 1, "is not above 1", "pretext.permutations pretext.clusters"),
    (lambda v: v >= -1, "is below -1", "data.workers"),
    (lambda v: 0 <= v <= 1, "is not in [0, 1]", "data.hw_decoder_load method.weight pretext.grey"),
    (lambda v: 0 <= v < 1, "is not in [0, 1)", "data.val_share optim.ema optim.label_smoothing"),
    (lambda v: 0 < v <= 1, "is not in (0, 1]", "data.min_area data.centre_share"),
]


def check(r: "Recipe") -> None:
    """Insists on values that make sense.

    Raises:
        ValueError: naming the field, its value and what would be right.
    """
    for test, complaint, fields_ in _RANGES:
        for name in fields_.split():
            group, _, key = name.partition(".")
            value = getattr(getattr(r, group), key)
            if not test(value):
                raise ValueError(f"{name}: {value} {complaint}")
    if not re.fullmatch(r"[\w.+-][\w.+ -]*", r.name):
        raise ValueError(f"name: {r.name!r} cannot be a folder's name: use letters, digits, '.', '_', '+' and '-'")
    grow = r.data.grow_epochs
    if r.data.grow_from and not (len(grow) == 2 and 0 <= grow[0] < grow[1] and r.data.grow_from < r.data.size):
        raise ValueError(
            f"data.grow_from, data.grow_epochs: {r.data.grow_from} and {grow} are not a side below data.size "
            f"({r.data.size}) and two epochs, the first before the second"
        )
    if r.data.grow_from and r.chosen_sources() and r.data.views and r.transfer.recall and not r.transfer.still:
        raise ValueError("data.grow_from: recalled sources need transfer.still, a size that does not grow")
    many = r.data.crop not in ("pad", "centre") or r.data.frames
    if r.transfer.every_view and (many or r.data.views or r.data.grow_from):
        raise ValueError(
            "transfer.every_view: only crop pad or centre of images, with data.views 0 and one size, has few views; here are "
            f"data.crop {r.data.crop}, data.frames {r.data.frames}, data.views {r.data.views}, data.grow_from "
            f"{r.data.grow_from}"
        )
    if r.run.sync_batch_norm and (
        r.run.accumulate > 1 or r.transfer.together in ("shared", "grouped") or r.transfer.recompute
    ):
        raise ValueError(
            "run.sync_batch_norm: it normalises whole batches, in the networks' own layers: set run.accumulate to 1, "
            f"transfer.together to plain and transfer.recompute to false (here {r.run.accumulate}, {r.transfer.together}, "
            f"{r.transfer.recompute})"
        )
    _check_pretext(r)
    if r.run.accumulate > r.data.batch:
        raise ValueError(f"run.accumulate: {r.run.accumulate} parts of a batch of {r.data.batch}")
    if any(not s.name or not s.model for s in r.sources):
        raise ValueError("sources: each needs a name and a model")
    names = [s.name for s in r.sources]
    if len(set(names)) < len(names) or not all(re.fullmatch(r"[A-Za-z_][\w-]*", n) for n in names):
        raise ValueError(f"sources: names must differ and hold letters, digits, '_' and '-' only, not {names}")
    for source in r.sources:
        if len(source.mean) != 3 or len(source.std) != 3 or min(source.std) <= 0:
            raise ValueError(f"sources: {source.name} needs three values of mean and three of std above 0")
    for name in r.rows:
        if not re.fullmatch(r"[\w.+-][\w.+ -]*", name):
            raise ValueError(f"rows: {name!r} cannot be a folder's name: use letters, digits, ' ', '.', '_', '+', '-'")


def _check_pretext(r: "Recipe") -> None:
    if r.pretext.task == "none":
        return
    if r.pretext.replaced > r.pretext.grid**2:
        raise ValueError(f"pretext.replaced: {r.pretext.replaced} of {r.pretext.grid**2} tiles")
    wrong = {
        "method.name": (r.method.name, "scratch"),
        "data.frames": (r.data.frames, 0),
        "data.labels": (r.data.labels, None),
        "data.balance": (r.data.balance, False),
    }
    for field, (value, right) in wrong.items():
        if value != right:
            raise ValueError(f"{field}: {value} does not go with pretext.task: {r.pretext.task}, which needs {right}")
