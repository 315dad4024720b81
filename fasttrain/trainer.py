"""The one loop: a target learns from labels and, where the recipe has sources, from their soft labels.

A step is Eq. (4) and (5) of the SSKT paper: the gradient of ``L_task + alpha * sum_m L_aux,m``, taken by SGD. The loop
knows nothing of the command line, and nothing of which loader, method or kind of source it was given.
"""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, interrupts
from .advice import advise
from .build import Parts
from .cosine import gradient_cosines
from .details import condensed
from .environment import environment
from .files import remove_unfinished, write_json, write_text
from .kernels import network_input
from .loaders import Batch
from .log import Clock, RunLog, Watcher, shares
from .optim import Schedule, build_average, build_optimiser
from .recipe import to_yaml
from .sources import RecalledSources, SoftTargets
from .sources.bank import Take


@dataclass(frozen=True)
class _Ready:
    """A batch that is on its way: its sources are at work or looked up, and ``position`` is the loader's after it."""

    batch: Batch
    soft: Take | None
    position: dict[str, Any]


class Trainer:
    """Trains one target with one seed, from the last checkpoint in its folder if there is one.

    Args:
        parts: from :func:`fasttrain.build.build`.
        folder: the run's own; made if it is not there.
        recall: folder of recalled soft targets, shared by the runs that can share them.
        watch: takes every line of the log, as a dict with ``kind``.
    """

    def __init__(self, parts: Parts, folder: Path, recall: Path, watch: Watcher) -> None:
        recipe = parts.recipe
        self.parts, self.recipe, self.folder, self.watch = parts, recipe, folder, watch
        self.target, self.task, self.method, self.loader = (
            parts.target,
            parts.task,
            parts.method,
            parts.loaders["train"],
        )
        self.optimisers = [
            build_optimiser(self.method.optim(number), *self.method.trained(self.target, number))
            for number in range(len(self.method.passes))
        ]
        self.schedule = Schedule(recipe.optim, len(self.loader))
        self.average = build_average(recipe.optim, self.target)
        self.scaler = torch.amp.GradScaler(parts.device.type, enabled=parts.dtype == torch.float16)
        self.mean, self.std = (torch.tensor(v, device=parts.device) for v in (recipe.data.mean, recipe.data.std))
        val_index_N = parts.loaders["val"].spec.index_N
        self.metric = self.task.metric(torch.from_numpy(parts.dataset.targets_N[val_index_N]))
        self.epoch, self.step, self.finished = 0, 0, False
        self.number = 0  # of the pass over the epoch's images
        self.best: dict[str, Any] = {"epoch": 0, "value": -math.inf, "val": {}}
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.clock, self.train_seconds = Clock(parts.device), 0.0
        self.position = self.loader.state_dict()
        self.speeds: list[float] = []
        self._last_place = 0
        kept = self._resume()
        for place in (folder, folder / "checkpoints"):
            place.mkdir(parents=True, exist_ok=True)
            remove_unfinished(place)
        write_text(folder / "recipe.yaml", to_yaml(recipe))
        self.log = RunLog(folder, watch, tensorboard=recipe.run.tensorboard, keep=kept, step=self.step)
        for line in parts.log:
            self._note(line)
        self.sources = None if self.finished else parts.open_sources(recall, self._note)
        if self.sources is not None:
            self._note(f"sources: {self.sources.describe()}")
        self.losses = self._losses
        if parts.compile != "off":
            torch._dynamo.config.recompile_limit = 32  # sizes that grow, and an epoch's last batch
            mode = "reduce-overhead" if parts.compile == "graphs" else None
            self.losses = torch.compile(self._losses, mode=mode, dynamic=False)

    def fit(self) -> dict[str, Any]:
        """Trains to the end, tests the selected weights once, and returns what goes into summary.json."""
        with interrupts.held():
            try:
                while self.epoch < self.recipe.optim.epochs and not self.finished:
                    self._train_epoch()
                    self._end_epoch()
                return self._finish()
            finally:
                self.log.close()
                if self.sources is not None:
                    self.sources.close()
                for loader in self.parts.loaders.values():
                    loader.close()

    def _train_epoch(self) -> None:
        for number in range(self.number, len(self.method.passes)):
            self.number = number
            self._train_pass()
            if number + 1 < len(self.method.passes):
                self.loader.set_epoch(self.epoch)
        self.number, self.position = 0, self.loader.state_dict()

    def _train_pass(self) -> None:
        for network in (self.target, self.method.companions):
            network.train()
        run = self.recipe.run
        self._choose_loader()
        self.clock.start()
        mark, images = time.perf_counter(), 0
        for ready in self._ahead():
            self._take_step(ready)
            self.step += 1
            self.position = ready.position
            interrupts.check()
            images += len(ready.batch)
            if self.step % run.log_every == 0:
                self.clock.settle()
                self._log_steps(images, time.perf_counter() - mark)
                self.train_seconds += time.perf_counter() - mark
                self.clock.mark("other")
                mark, images = time.perf_counter(), 0
            if run.checkpoint_steps and self.step % run.checkpoint_steps == 0 and self._inside_epoch():
                self.train_seconds += time.perf_counter() - mark
                self._save()
                self.clock.start()
                mark, images = time.perf_counter(), 0
        self.clock.settle()
        self.train_seconds += time.perf_counter() - mark

    def _choose_loader(self) -> None:
        """Takes a loader that serves stills only if the sources will look at them in this epoch."""
        if not isinstance(self.sources, RecalledSources) or not self.sources.still:
            return
        wanted = self.recipe.transfer.still if self.sources.needs_still(self.epoch) else 0
        if wanted != self.loader.spec.still:
            bad = self.loader.bad
            self.loader.close()
            self.loader = self.parts.open_loader(replace(self.parts.train_spec, still=wanted))
            self.loader.load_state_dict(self.position)
            self.loader.bad |= bad
            self.parts.loaders["train"] = self.loader

    def _ahead(self) -> Iterator[_Ready]:
        """The rest of the epoch. On a GPU the sources are given the next batch before the target takes its step with
        this one, so that the two are at work together."""
        batches = iter(self.loader)
        ready = self._begin(batches)
        while ready is not None:
            following = self._begin(batches) if self.parts.device.type == "cuda" else None
            yield ready
            ready = following if self.parts.device.type == "cuda" else self._begin(batches)

    def _begin(self, batches: Iterator[Batch]) -> _Ready | None:
        batch = next(batches, None)
        self.clock.mark("data")
        if batch is None:
            return None
        soft = self.sources.start(batch) if self.sources is not None else None
        self.clock.mark("sources")
        return _Ready(batch, soft, self.loader.state_dict())

    def _take_step(self, ready: _Ready) -> None:
        optim, batch = self.recipe.optim, ready.batch
        soft = ready.soft() if ready.soft is not None else None
        self.clock.mark("sources")
        number, at = self.number, self._place()
        self._last_place = at
        rise, factor = self.schedule.rise(at), self.schedule.factor(at)
        losses: dict[str, Tensor] = {}
        every = self.recipe.run.cosine_every
        if every and not number and at % every == 0:
            losses |= self._cosines(batch, soft)
        for pixels, targets, its_soft in self._parts_of(batch, soft):
            if self.parts.compile == "graphs":
                torch.compiler.cudagraph_mark_step_begin()
            share = len(targets) / len(batch)
            found = (
                self._other_losses(pixels, targets, optim.lr * rise * factor)
                if number
                else self.losses(pixels, targets, its_soft)
            )
            loss = self.scaler.scale(found["loss"] if share == 1 else found["loss"] * share)
            loss.backward(inputs=_parameters(self.optimisers[number]) if number else None)
            for name, value in found.items():
                losses[name] = losses.get(name, 0) + value.detach() * share
        self.clock.mark("target")
        optimiser, spec = self.optimisers[number], self.method.optim(number)
        for group in optimiser.param_groups:
            group["lr"] = spec.lr * rise * factor * group.get("factor", 1.0)
        if optim.clip_norm:
            self.scaler.unscale_(optimiser)
            torch.nn.utils.clip_grad_norm_(_parameters(optimiser), optim.clip_norm)
        self.scaler.step(optimiser)
        self.scaler.update()
        optimiser.zero_grad(set_to_none=True)
        if self.average is not None and not number:
            self.average.update_parameters(self.target)
        prefix = f"{self.method.passes[number]}/" if number else ""
        for name, value in losses.items():  # stays on the device; read every N steps
            self.sums[prefix + name] = self.sums.get(prefix + name, 0) + value
            self.counts[prefix + name] = self.counts.get(prefix + name, 0) + 1
        self.clock.mark("optimiser")

    def _place(self) -> int:
        """Of a step in the schedule: steps of the epoch's other passes are at the places of the first's."""
        count = len(self.loader)
        epoch, rest = divmod(self.step, count * len(self.method.passes))
        return epoch * count + rest % count

    def _parts_of(self, batch: Batch, soft: SoftTargets | None) -> Iterator[tuple[Tensor, Tensor, SoftTargets | None]]:
        """The batch, or with ``run.accumulate`` its parts."""
        count = min(self.recipe.run.accumulate, len(batch))
        size = -(-len(batch) // count)
        if count == 1:
            yield batch.pixels, batch.targets, soft
            return
        softs = [None] * len(batch.pixels.split(size)) if soft is None else soft.split(size)
        yield from zip(batch.pixels.split(size), batch.targets.split(size), softs, strict=True)

    def _losses(self, pixels: Tensor, targets_B: Tensor, soft: SoftTargets | None) -> dict[str, Tensor]:
        """The forward pass, from bytes to the method's losses: what is compiled."""
        return self.method.step(self.target, network_input(pixels, self.mean, self.std), targets_B, soft)

    def _other_losses(self, pixels: Tensor, targets_B: Tensor, lr: float) -> dict[str, Tensor]:
        """Those of an epoch's later passes. They are not compiled: a compiler does not differentiate a gradient."""
        x = network_input(pixels, self.mean, self.std)
        return self.method.other_step(self.number, self.target, x, targets_B, lr)

    def _cosines(self, batch: Batch, soft: SoftTargets | None) -> dict[str, Tensor]:
        x = network_input(batch.pixels, self.mean, self.std)
        found = gradient_cosines(self.method, self.target, x, batch.targets, soft)
        return {f"cosine/{name}": value for name, value in found.items()}

    def _end_epoch(self) -> None:
        run = self.recipe.run
        self.epoch += 1
        last = self.epoch == self.recipe.optim.epochs
        if self.epoch % run.eval_every == 0 or last:
            val = self.evaluate("val")
            self.schedule.heard(val["loss"])
            if run.select == "last" or val[self.metric] > self.best["value"]:
                self.best = {"epoch": self.epoch, "value": val[self.metric], "val": val}
                self._save_selected()
            self.log.write({"kind": "eval", "epoch": self.epoch, "step": self.step, "metric": self.metric} | val)
        if self.epoch % run.checkpoint_every == 0 or last:
            self.finished = last
            self._save()

    def _finish(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        if path.is_file():
            return checkpoint.read_summary(path)
        selected = self.folder / "checkpoints" / "selected.pt"
        checkpoint.load_target(self.target, checkpoint.load(selected), selected, self.parts.dataset.classes)
        self.average = None
        test, details = evaluate_in_detail(self.parts, self.target, "test")
        summary = {
            "name": self.recipe.name,
            "metric": self.metric,
            "selected_epoch": self.best["epoch"],
            "val": self.best["val"],
            "test": test,
            "details": details,
            "images_per_s": median(self.speeds) if self.speeds else self._mean_speed(),
            "train_seconds": self.train_seconds,
            "time_share_percent": shares(self.clock.seconds),
            "advice": self._advice(shares(self.clock.seconds)),
            "epochs": self.epoch,
            "steps": self.step,
            "seed": self.recipe.run.seed,
            "sources": {n.spec.name: {"model": n.spec.model, "sha256": n.sha256} for n in self.parts.networks},
            "bad_samples": {split: len(loader.bad) for split, loader in self.parts.loaders.items()},
            "log": self.parts.log,
            "environment": environment(),
        }
        write_json(path, summary)
        self.watch({"kind": "done"} | summary)
        return summary

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """The task's figures on a split: the moving average's if there is one. No source and no auxiliary head runs."""
        return evaluate(self.parts, self.average.module if self.average is not None else self.target, split)

    def _mean_speed(self) -> float:
        return self.step * self.recipe.data.batch / max(self.train_seconds, 1e-9)

    def _inside_epoch(self) -> bool:
        return self.position["batch"] < len(self.loader)

    def _log_steps(self, images: int, seconds: float) -> None:
        means = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        wrong = next((v for name, v in means.items() if name.endswith("loss") and not math.isfinite(v)), None)
        if wrong is not None:
            raise ValueError(
                f"the loss is {wrong} by step {self.step}: optim.lr {self.recipe.optim.lr:g} may be too high; "
                "try a lower one, warmup_epochs or clip_norm"
            )
        self.sums, self.counts = {}, {}
        self.speeds.append(images / seconds)
        lately = shares(self.clock.lately)
        told: dict[str, Any] = {f"{part}_share": share for part, share in lately.items()}
        told["advice"] = self._advice(lately)
        position = {
            "epoch": self.epoch,
            "epochs": self.recipe.optim.epochs,
            "step": self.step,
            "steps": self.schedule.steps * len(self.method.passes),
            "lr": self.schedule.lr(self._last_place),
        }
        self.log.write({"kind": "step"} | position | means | {"images_per_s": images / seconds} | told)

    def _advice(self, share: dict[str, float]) -> str:
        recalled = isinstance(self.sources, RecalledSources)
        return advise(
            share, self.recipe, self.parts.loader_name, recalled=recalled, compiled=self.parts.compile != "off"
        )

    def _note(self, text: str) -> None:
        self.watch({"kind": "note", "text": text})

    def _save(self) -> None:
        state = {
            "target": self.target.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "classes": list(self.parts.dataset.classes),
            "companions": self.method.companions.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.position,
            "bad_samples": self.loader.bad,
            "dataset": self.parts.dataset.identity(),
            "position": {"epoch": self.epoch, "pass": self.number, "step": self.step, "finished": self.finished},
            "best": self.best,
            "sums": self.sums,
            "counts": self.counts,
            "times": {"clock": self.clock.seconds, "speeds": self.speeds, "train": self.train_seconds},
            "random": torch.get_rng_state(),
            "log_bytes": self.log.position(),
            "recipe": asdict(self.recipe),
        }
        checkpoint.save(self.folder / "checkpoints" / "last.pt", state)

    def _save_selected(self) -> None:
        weights = (self.average.module if self.average is not None else self.target).state_dict()
        state = {"target": weights, "classes": list(self.parts.dataset.classes), "epoch": self.epoch}
        state |= {"recipe": asdict(self.recipe), "metric": self.metric, "val": self.best["val"]}
        state |= {"dataset": self.parts.dataset.identity()}
        checkpoint.save(self.folder / "checkpoints" / "selected.pt", state)

    def _resume(self) -> int:
        """Goes to where the last checkpoint was; returns the bytes of the log it knew of."""
        path = self.folder / "checkpoints" / "last.pt"
        if not path.is_file():
            return 0
        state = checkpoint.load(path)
        checkpoint.same_recipe(state["recipe"], asdict(self.recipe), self.folder)
        checkpoint.load_target(self.target, state, path, self.parts.dataset.classes)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.method.companions.load_state_dict(state["companions"])
        for optimiser, its in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(its)
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if state["dataset"] != self.parts.dataset.identity():
            raise ValueError(f"data: {self.parts.dataset.source} has changed since the run in {self.folder} began")
        self.loader.load_state_dict(state["loader"])
        self.position = state["loader"]
        self.loader.bad |= state["bad_samples"]
        place = state["position"]
        self.epoch, self.number, self.step, self.finished = (place[k] for k in ("epoch", "pass", "step", "finished"))
        self.best, self.counts = state["best"], state["counts"]
        self.sums = {name: value.to(self.parts.device) for name, value in state["sums"].items()}
        times = state["times"]
        self.clock.seconds, self.speeds, self.train_seconds = times["clock"], times["speeds"], times["train"]
        torch.set_rng_state(state["random"])
        self._note(f"going on from {path}: epoch {self.epoch}, step {self.step}")
        return state["log_bytes"]


def _parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimiser.param_groups for p in group["params"]]


def evaluate(parts: Parts, target: torch.nn.Module, split: str) -> dict[str, float]:
    """The task's figures on a split, under the run's precision."""
    return _figures(parts, *_answers(parts, target, split))


def evaluate_in_detail(parts: Parts, target: torch.nn.Module, split: str) -> tuple[dict[str, float], dict[str, Any]]:
    """What :func:`evaluate` gives, and what a report shows besides: the task's ``details``, condensed."""
    logits_NK, targets_N, index_N = _answers(parts, target, split)
    figures = _figures(parts, logits_NK, targets_N, index_N)
    if parts.recipe.data.frames:
        logits_NK, targets_N = parts.task.by_video(logits_NK, targets_N, index_N)
    return figures, condensed(parts.task.details(logits_NK, targets_N))


def _figures(parts: Parts, logits_NK: Tensor, targets_N: Tensor, index_N: Tensor) -> dict[str, float]:
    if parts.recipe.data.frames:
        return parts.task.evaluate_videos(logits_NK, targets_N, index_N)
    return parts.task.evaluate(logits_NK, targets_N)


@torch.no_grad()
def _answers(parts: Parts, target: torch.nn.Module, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, K], targets and indices of a split's samples, of clips one each."""
    target.eval()
    mean, std = (torch.tensor(v, device=parts.device) for v in (parts.recipe.data.mean, parts.recipe.data.std))
    logits, targets, index = [], [], []
    with interrupts.held(), closing(parts.loaders[split]) as loader:
        loader.set_epoch(0)
        for batch in loader:
            with torch.autocast(parts.device.type, parts.dtype, enabled=parts.dtype != torch.float32):
                logits.append(target(network_input(batch.pixels, mean, std)).logits_BK.float())
            targets.append(batch.targets)
            index.append(batch.index)
            interrupts.check()
    return torch.cat(logits), torch.cat(targets), torch.cat(index)
