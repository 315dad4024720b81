"""From a recipe to the parts of a run. Every mistake a recipe can hold comes to light here, before anything is written."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from . import ranks
from .device import check_step, choose_compile, choose_dtype, choose_source_dtype, own_device
from .fetch import data_root
from .kernels import SoftTargetLoss
from .loaders import (
    ClipPlan,
    Dataset,
    Growth,
    LoaderSpec,
    Puzzle,
    ViewPlan,
    choose_loader,
    evaluation,
    open_dataset,
    open_loader,
)
from .loaders.base import EpochLoader
from .loaders.order import part_sizes
from .methods import METHODS, Method, Setting
from .models import Backbone, PuzzleTarget, Target, build_backbone, load_backbone
from .models.sync_batch_norm import synchronised
from .pretext.data import puzzle_of, with_own_labels
from .pretext.source import CLUSTERS, open_clusters
from .recipe import Recipe, Source
from .samples import own_labels, training_indices
from .sources import RecalledSources, SourceBank, SourceNetwork, open_source
from .sources.bank import chosen_strategy
from .sources.recall import label_form, open_files
from .tasks import TASKS, Task
from .trained import TRAINED, open_trained
from .transfer import AuxiliaryHead, LinearHead, TransferModule, run_together


@dataclass
class Parts:
    """What a run is made of."""

    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    source_dtype: torch.dtype
    dataset: Dataset
    open_loader: Callable[[LoaderSpec], EpochLoader]
    train_spec: LoaderSpec
    loaders: dict[str, EpochLoader]
    target: Target
    task: Task
    method: Method
    networks: list[SourceNetwork]
    loader_name: str
    compile: str
    log: list[str]

    @property
    def source_spec(self) -> LoaderSpec:
        """Of a loader that shows the sources what they want to see."""
        return replace(self.train_spec, still=self.recipe.transfer.still)

    def open_sources(
        self, folder: Path, report: Callable[[str], None], *, in_memory: bool = True
    ) -> SourceBank | RecalledSources | None:
        """The sources ready to be asked: None without any, recalled where the recipe says so, else live.

        Args:
            folder: of recalled soft labels, unless the recipe names one.
            report: takes a line on what is being done, or is not and why.
            in_memory: keep recalled soft labels on the device, if they fit into ``transfer.recall_gib``.

        Raises:
            ValueError: a strategy that cannot run here, or recalled soft labels of something else.
        """
        if not self.networks:
            return None
        transfer = self.recipe.transfer

        def bank() -> SourceBank:
            compiles = self.compile != "off"
            return SourceBank(
                self.networks, self.source_dtype, strategy=transfer.bank, compiles=compiles, report=report
            )

        drifting = [n.spec.name for n in self.networks if n.spec.batch_norm == "batch"]
        if not recalls(self.recipe) or drifting:
            if recalls(self.recipe):
                report(f"soft targets are not recalled: {drifting[0]} has batch_norm: batch, which no cache can hold")
            return bank()
        files = open_files(
            self.networks,
            self.source_spec,
            folder=Path(transfer.cache) if transfer.cache else folder,
            dtype=self.source_dtype,
            top=transfer.recall_top,
            strict=transfer.cache is not None,
            report=report,
        )
        fits = label_bytes(self.recipe, len(self.train_spec.index_N), self.source_dtype) <= transfer.recall_gib * 2**30
        return RecalledSources(
            bank,
            files,
            names=[n.spec.name for n in self.networks],
            index_N=self.train_spec.index_N,
            device=self.device,
            still=transfer.still > 0,
            in_memory=in_memory and fits,
            report=report,
        )


def build(recipe: Recipe) -> Parts:
    """Opens data, target and sources of one run.

    Raises:
        ValueError: with the field, its value and what would be right.
    """
    device = own_device(recipe.run.device)
    dtype, why = choose_dtype(recipe.run.precision, device)
    log = [f"device: {device}, {str(dtype).removeprefix('torch.')} ({why})"]
    its = ranks.here()
    if its.several:
        log += [
            f"processes: {its.count}, {recipe.run.accumulate if recipe.run.accumulate > 1 else its.count} parts a batch"
        ]
    compile_, why = choose_compile(recipe.run.compile, device)
    if compile_ == "step":
        check_step(recipe, dtype)
    log += [f"compiled: {compile_} ({why})"]
    if recipe.run.protocol == "paper":
        log += ["protocol: paper: weights are SELECTED ON THE TEST SPLIT: too good a figure; nothing is held out"]
    dataset, task, kind = ground(recipe)
    train_spec, eval_specs = loader_specs(recipe, dataset)
    if train_spec.puzzle and recipe.data.crop == "pad" and recipe.data.pad:
        log += [
            f"puzzles: data.pad {recipe.data.pad} leaves black rims, which tell where tiles belong (unless images are black "
            "there themselves); set data.pad to 0, or data.crop to random_resized"
        ]
    name, why = (recipe.data.loader, "as asked")
    if name == "auto":
        name, why = choose_loader(train_spec, device)
    torch.manual_seed(recipe.run.seed)
    its_classes = dataset.classes if recipe.method.name == "kd" else None
    networks = [_opened(s, recipe, its_classes).to(device) for s in recipe.chosen_sources()]
    log += [f"source {n.spec.name}: {n.spec.model}, {n.origin}, SHA-256 {n.sha256[:16]}" for n in networks]
    if networks:
        strategy = chosen_strategy(recipe.transfer.bank, networks, compile_ != "off")
        source_dtype = choose_source_dtype(recipe.transfer.precision, dtype, device)
        log += [f"sources, where they run: {strategy}, {str(source_dtype).removeprefix('torch.')}"]
    torch.manual_seed(recipe.run.seed)
    target = build_target(recipe, task.head_size, kind.heads(recipe, task.classes))
    _same_dims(recipe, target)
    companions = kind.networks(recipe, task.classes)
    for network in (target, *companions.values()):
        for size in {recipe.data.size, recipe.data.grow_from or recipe.data.size}:
            _check_size(network.backbone, size, train_spec.puzzle)  # type: ignore[arg-type]
    kind.load(recipe, companions)
    log += [f"{name}: {_of(network)}" for name, network in companions.items()]
    log += [f"target: {recipe.target.model} from {target.origin}"] if recipe.target.weights else []
    if recipe.run.channels_last:
        for network in (target, *companions.values()):
            network.channels_last()  # type: ignore[operator]
    companions = {name: network.to(device) for name, network in companions.items()}
    if recipe.run.sync_batch_norm and its.several:
        target = synchronised(target, device)  # type: ignore[assignment]
        companions = {name: synchronised(network, device) for name, network in companions.items()}
    method = kind(Setting(recipe, task, device.type, dtype, _soft_target_losses(recipe, device, log), companions))

    def opener(spec: LoaderSpec) -> EpochLoader:
        return open_loader(name, spec, device, loader_workers(recipe), hw_decoder_load=recipe.data.hw_decoder_load)

    loaders = {"train": opener(train_spec)} | {split: opener(spec) for split, spec in eval_specs.items()}
    log += [f"loader: {name} ({why}); {loaders['train'].describe()}"]
    return Parts(
        recipe=recipe,
        device=device,
        dtype=dtype,
        source_dtype=choose_source_dtype(recipe.transfer.precision, dtype, device),
        dataset=dataset,
        open_loader=opener,
        train_spec=train_spec,
        loaders=loaders,
        target=target.to(device),
        task=task,
        method=method,
        networks=networks,
        loader_name=name,
        compile=compile_,
        log=log,
    )


def ground(recipe: Recipe) -> tuple[Dataset, Task, type[Method]]:
    """What a run stands on, without its networks: data set, task and kind of method.

    Raises:
        ValueError: as :func:`build`.
    """
    dataset = open_data(recipe)
    name = "own_labels" if own_labels(recipe) else "multi_label" if dataset.multi_label else "single_label"
    task = TASKS[name](len(dataset.classes), recipe.optim.label_smoothing)
    kind = method_of(recipe)
    kind.check(recipe, task)
    if len(kind.passes) > 1 and ranks.here().several:
        raise ValueError(f"method.name: {recipe.method.name} trains in one process, and here are {ranks.here().count}")
    return dataset, task, kind


def open_data(recipe: Recipe) -> Dataset:
    """The recipe's data set, its class count checked against ``target.classes``; with ``run.protocol: paper`` nothing is held
    out for validation, and the test split stands in for it. Where the recipe makes labels of its own (``pretext.task``,
    ``data.labels``), they are in the place of the data set's."""
    data = recipe.data
    root = data_root(data, lambda text: print(f"fasttrain: {text}", file=sys.stderr, flush=True))
    dataset = open_dataset(
        data.name, root, val_share=data.val_share, verify=data.verify, split=data.split, decoder=data.decoder
    )
    if recipe.run.protocol == "paper":
        splits = dataset.splits
        together = np.sort(np.concatenate([splits["train"], splits["val"]]))
        dataset = replace(dataset, splits={"train": together, "val": splits["test"], "test": splits["test"]})
    dataset = with_own_labels(dataset, recipe)
    if data.frames and not dataset.video:
        raise ValueError(f"data.frames: {data.frames}, and {dataset.name} is no data set of videos")
    if recipe.target.classes not in (0, len(dataset.classes)):
        raise ValueError(
            f"target.classes: {recipe.target.classes}, but {dataset.name} has {len(dataset.classes)} classes"
        )
    for split in ("train", "val", "test"):
        if not len(dataset.splits[split]):
            raise ValueError(f"data: the {split} split of {dataset.name} is empty; see data.val_share")
    return dataset


def loader_specs(recipe: Recipe, dataset: Dataset) -> tuple[LoaderSpec, dict[str, LoaderSpec]]:
    """What to load for training, and for ``val`` and ``test``."""
    data = recipe.data
    index_N = training_indices(recipe, dataset)
    last = len(index_N) % data.batch
    if not data.drop_last and last == 1:
        raise ValueError(
            f"data.batch: {len(index_N)} images in batches of {data.batch} leave a last batch of 1, which batch "
            "normalisation cannot use; choose another size, or set data.drop_last"
        )
    if data.drop_last and data.batch > len(index_N):
        raise ValueError(f"data.batch: {data.batch} is more than the {len(index_N)} images, and data.drop_last is set")
    its = ranks.here()
    parts = _parts(recipe, its, {min(data.batch, len(index_N))} | ({last} - {0} if not data.drop_last else set()))
    every = recipe.transfer.every_view and recalls(recipe) and bool(recipe.chosen_sources())
    if every and data.frames:
        raise ValueError(
            "transfer.every_view: clips begin anywhere, so there are too many views to number; set data.views"
        )
    plan = ViewPlan(data.crop, data.pad, data.min_area, data.centre_share, data.flip, data.views, every)
    # recalled sources look at an image only as long as a label is missing; the trainer asks for stills then
    still = recipe.transfer.still if recipe.chosen_sources() and not recalls(recipe) else 0
    train = LoaderSpec(
        dataset=dataset,
        index_N=index_N,
        plan=plan,
        size=data.size,
        stored=data.stored,
        batch=data.batch,
        seed=recipe.run.seed,
        view_seed=data.seed,
        drop_last=data.drop_last,
        still=still,
        growth=Growth(data.grow_from, *data.grow_epochs) if data.grow_from else None,
        balance=data.balance,
        on_bad_sample=data.on_bad_sample,
        clip=ClipPlan(data.frames, data.stride) if data.frames else None,
        puzzle=puzzle_of(recipe),
        rank=its.rank,
        ranks=its.count,
        parts=parts if recipe.run.accumulate > 1 else 0,
    )
    whole = data.batch if data.frames else max(data.batch, 250)
    evals = {
        split: LoaderSpec(
            dataset=dataset,
            index_N=dataset.splits[split],
            plan=evaluation(data.centre_share),
            size=data.size,
            stored=data.stored,
            batch=-(-whole // (2 * its.count)) * 2 * its.count if its.several else whole,
            shuffle=False,
            on_bad_sample=data.on_bad_sample,
            clip=ClipPlan(data.frames, data.stride, max(data.clips, 1), data.crops) if data.frames else None,
            view_seed=data.seed,
            puzzle=train.puzzle,
            rank=its.rank,
            ranks=its.count,
        )
        for split in ("val", "test")
    }
    return train, evals


def _parts(recipe: Recipe, its: ranks.Ranks, sizes: set[int]) -> int:
    """Into how many parts a batch is cut, over all processes.

    Args:
        sizes: of the batches that there will be: a full one, and an epoch's last one.

    Raises:
        ValueError: parts that cannot be shared out, or are too small for batch norm.
    """
    run, unit = recipe.run, 2 if recipe.pretext.task != "none" else 1
    parts = run.accumulate if run.accumulate > 1 else its.count
    if parts % its.count:
        raise ValueError(
            f"run.accumulate: {parts} parts of a batch cannot be shared out to {its.count} processes; choose a multiple of that"
        )
    full, least = max(sizes), min(sizes)
    if parts > 1 and full < 2 * parts:
        field = "run.accumulate" if run.accumulate > 1 else "data.batch"
        raise ValueError(
            f"{field}: {parts} parts of a batch of {full} leave one with fewer than 2 samples, which batch norm cannot use"
        )
    each = parts // its.count
    share = [
        [sum(part_sizes(n, parts, unit)[r * each : (r + 1) * each]) for r in range(its.count)] for n in (full, least)
    ]
    if any(few > many for many, few in zip(*share, strict=True)):
        raise ValueError(
            f"data.batch: the last batch of {least} samples cannot be shared out to {its.count} processes like the others; "
            "choose another size, or set data.drop_last"
        )
    if run.sync_batch_norm and not all(part_sizes(least, parts, unit)):
        raise ValueError(
            f"run.sync_batch_norm: the last batch of {least} samples leaves some of {parts} parts empty; choose another "
            "data.batch, or set data.drop_last"
        )
    return parts


def loader_workers(recipe: Recipe) -> int:
    """Threads or processes of a loader: as asked, or one for each core that falls to this run."""
    if recipe.data.workers >= 0:
        return recipe.data.workers
    return max(len(os.sched_getaffinity(0)) // (recipe.run.parallel * ranks.here().local_count), 1)


def build_target(recipe: Recipe, classes: int, source_classes: dict[str, int], *, weights: bool = True) -> Target:
    """A target with an auxiliary head for each source.

    Args:
        recipe: whose ``target`` and ``transfer`` it follows.
        classes: of the task.
        source_classes: of each auxiliary head, by name: a source's, or what else the method teaches.
        weights: start from ``target.weights``; without, the backbone is random, for those who want its shapes or load a
            checkpoint of their own.

    Raises:
        ValueError: a backbone that does not exist or does not offer what was chosen, or weights that do not fit.
    """
    spec = recipe.target
    backbone = build_backbone(spec.model, shortcut=spec.shortcut, width=spec.width)
    puzzle, pretext = puzzle_of(recipe), recipe.pretext
    if puzzle is None:
        target = Target(backbone, classes)
    else:
        target = PuzzleTarget(
            backbone, places=puzzle.places, classes=classes, width=pretext.width, hidden=pretext.hidden
        )
    for name, count in source_classes.items():
        head: AuxiliaryHead
        if recipe.transfer.module:
            width = recipe.transfer.width or backbone.transfer_width
            head = TransferModule(backbone.tap_channels, width, count, recipe.transfer.combine, dims=backbone.dims)
        else:
            head = LinearHead(backbone.feature_dim, count)
        target.aux_heads[name] = head
    transfer = recipe.transfer
    if transfer.module and source_classes and (transfer.together != "auto" or transfer.recompute):
        form = "plain" if transfer.together == "auto" else transfer.together
        target.together = partial(run_together, form=form, pad_to=transfer.pad_to, recompute=transfer.recompute)
    if weights and spec.weights is not None:  # after all of it is made, which then starts from the same random numbers
        target.origin = load_backbone(backbone, spec.weights, spec.sha256)
    backbone.freeze(spec.frozen)
    return target


def _check_size(backbone: Backbone, size: int, puzzle: Puzzle | None) -> None:
    side = puzzle.side(size) if puzzle else size
    try:
        backbone.check_size(side, side)
    except ValueError as error:
        if puzzle is None:
            raise
        raise ValueError(str(error).replace("data.size", "pretext.tile, data.size", 1)) from None


def _same_dims(recipe: Recipe, target: Target) -> None:
    """Raises ``ValueError`` where a network for images is to see clips, or the other way round."""
    frames, dims = recipe.data.frames, target.backbone.dims
    if (dims == 3) != (frames > 0):
        right = "set data.frames, such as 16" if dims == 3 else "set data.frames to 0, or choose a 3D network"
        if recipe.pretext.task != "none":
            right = "tiles of a puzzle are images: choose a network for them"
        raise ValueError(f"target.model: {recipe.target.model} takes {'clips' if dims == 3 else 'images'}; {right}")


def method_of(recipe: Recipe) -> type[Method]:
    """The recipe's method.

    Raises:
        ValueError: unknown, or without the sources it needs.
    """
    name = recipe.method.name
    if name not in METHODS:
        raise ValueError(f"method.name: no method is called {name!r}; there are {', '.join(METHODS)}")
    if METHODS[name].takes_sources and not recipe.chosen_sources():
        raise ValueError(f"sources: {name} needs at least one; the recipe chooses none")
    return METHODS[name]


def _soft_target_losses(recipe: Recipe, device: torch.device, log: list[str]) -> Callable[..., SoftTargetLoss]:
    """Makes losses against soft labels on the recipe's kernels; a line for the log says which, and why."""

    def make(class_counts: list[int], **options) -> SoftTargetLoss:
        loss = SoftTargetLoss(class_counts, **options, implementation=recipe.run.kernels, device=device.type)
        log.append(f"soft-target losses: {loss.implementation} ({loss.why})")
        return loss

    return make


def _opened(source: Source, recipe: Recipe, classes: tuple[str, ...] | None) -> SourceNetwork:
    if source.model == CLUSTERS:
        return open_clusters(source, recipe)
    return open_trained(source, classes) if source.model == TRAINED else open_source(source)


def _of(network: torch.nn.Module) -> str:
    return f"{network.backbone.name}, {sum(p.numel() for p in network.parameters()):,} parameters"  # type: ignore[union-attr]


def recalls(recipe: Recipe) -> bool:
    """Whether the recipe's soft targets are meant to be recalled."""
    return recipe.transfer.recall and (recipe.data.views > 0 or recipe.transfer.every_view)


def label_bytes(recipe: Recipe, samples: int, dtype: torch.dtype) -> int:
    """Size of the recalled soft labels of all chosen sources, of so many samples in every view."""
    data, transfer = recipe.data, recipe.transfer
    plan = ViewPlan(data.crop, data.pad, flip=data.flip, views=data.views, every=transfer.every_view)
    each = sum(label_form(s.classes, dtype, transfer.recall_top).record_bytes for s in recipe.chosen_sources())
    return plan.count * samples * each
