"""The one loop: a target learns from labels and, where the recipe has sources, from their soft labels.

A step is Eq. (4) and (5) of the SSKT paper: the gradient of ``L_task + alpha * sum_m L_aux,m``, taken by SGD. The loop
knows nothing of the command line, and nothing of which loader, method or kind of source it was given.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, interrupts, ranks
from .advice import advise
from .build import Parts
from .environment import environment
from .evaluation import evaluate, evaluate_in_detail
from .files import insist_on_room, make_folder, size_of, write_json, write_text
from .guard import FiniteGuard, Where
from .loaders import Batch
from .log import Clock, RunLog, Watcher, shares
from .optim import Schedule
from .recipe import to_yaml
from .shortage import explained
from .sources import RecalledSources
from .sources.bank import Take
from .step import Stepper
from .watchdog import Watchdog
from .writer import CheckpointWriter

_SLACK = 10.0  # times run.timeout that a first step may take


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
        self.ranks = ranks.here()
        self.parts, self.recipe, self.folder = parts, recipe, folder
        self.watch: Watcher = watch if self.ranks.first else (lambda line: None)
        self.target, self.task, self.method, self.loader = (
            parts.target,
            parts.task,
            parts.method,
            parts.loaders["train"],
        )
        self.schedule = Schedule(recipe.optim, len(self.loader))
        self.clock, self.train_seconds = Clock(parts.device), 0.0
        self.guard = FiniteGuard(
            parts.device, allowed=recipe.run.skip_nonfinite, tell=self._left_out, stop=self._not_finite
        )
        self.stepper = Stepper(parts, self.ranks, self.schedule, self.guard, self.clock)
        self.optimisers, self.average = self.stepper.optimisers, self.stepper.average
        self.mean, self.std = self.stepper.mean, self.stepper.std
        val_index_N = parts.loaders["val"].spec.index_N
        self.metric = self.task.metric(torch.from_numpy(parts.dataset.targets_N[val_index_N]))
        self.epoch, self.step, self.finished = 0, 0, False
        self.number = 0  # of the pass over the epoch's images
        self.best: dict[str, Any] = {"epoch": 0, "value": -math.inf, "val": {}}
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.position = self.loader.state_dict()
        self.speeds: list[float] = []
        self._last_place = 0
        self.checkpoints = folder / "checkpoints"
        kept = self._resume()
        networks = (self.target, self.method.companions)
        self.ranks.share(t for n in networks for t in n.state_dict().values())  # others may draw other random numbers
        self.ranks.first_does(self._make_folder)
        place, board = folder if self.ranks.first else None, recipe.run.tensorboard
        self.log = RunLog(place, watch, tensorboard=board, keep=kept, step=self.step, device=parts.device)
        self.writer = CheckpointWriter(self.checkpoints, keep=recipe.run.keep, report=self._note)
        for line in parts.log:
            self._note(line)
        self.sources = None if self.finished else parts.open_sources(recall, self._note)
        if self.sources is not None:
            self._note(f"sources: {self.sources.describe()}")

    def fit(self) -> dict[str, Any]:
        """Trains to the end, tests the selected weights once, and returns what goes into summary.json.

        Raises:
            Preempted: this process, or one of the others, was asked to end; a checkpoint is on the disk.
            ValueError: a gradient or loss that is not finite, or too little memory.
            Lost, Stalled: another process, or a loader, is late.
        """
        with interrupts.held(), self._watchdog(), explained(self.recipe, self.parts.device):
            try:
                while self.epoch < self.recipe.optim.epochs and not self.finished:
                    self._train_epoch()
                    self._end_epoch()
                summary = self._finish()
                self.ranks.doing("writes a checkpoint")
                self.writer.wait()
                if self.ranks.agree(interrupts.asked()):
                    interrupts.settle()
                    raise interrupts.Preempted(f"asked to end; {self.folder} is finished")
                return summary
            except interrupts.Asked:
                raise self._preempted() from None
            finally:  # what was being done is still what the others are told, if it is why this one ends
                self.writer.close()
                self.log.close()
                self.stepper.close()
                if self.sources is not None:
                    self.sources.close()
                for loader in self.parts.loaders.values():
                    loader.close()

    @contextmanager
    def _watchdog(self) -> Iterator[None]:
        its = self.ranks
        watchdog = Watchdog(
            seconds=self.recipe.run.timeout,
            rank=its.rank,
            ranks=its.count,
            store=its.store,
            report=self._note,
            folder=self.folder,
        )
        with watchdog:
            its.barrier()
            watchdog.meet()
            first = self.step + 2  # steps that are compiled

            def doing(what: str) -> None:
                watchdog.doing(what, self.step, slack=_SLACK if self.step < first else 1.0)

            its.doing, its.idle, its.late = doing, watchdog.idle, watchdog.late
            try:
                yield
            finally:
                its.doing, its.idle, its.late = (lambda what: None), (lambda: None), (lambda: "")

    def _make_folder(self) -> None:
        for place in (self.folder, self.checkpoints):
            make_folder(place)
        if not self.finished:
            size = size_of(self._state())
            insist_on_room(
                self.checkpoints, (self.recipe.run.keep + 2) * size - _used(self.checkpoints), "its checkpoints"
            )
        write_text(self.folder / "recipe.yaml", to_yaml(self.recipe))

    def _train_epoch(self) -> None:
        for number in range(self.number, len(self.method.passes)):
            self.number = number
            self._train_pass()
            if number + 1 < len(self.method.passes):
                self.loader.set_epoch(self.epoch)
                self.number, self.position = number + 1, self.loader.state_dict()

    def _train_pass(self) -> None:
        for network in (self.target, self.method.companions):
            network.train()
        run = self.recipe.run
        self._choose_loader()
        self.clock.start()
        mark, images = time.perf_counter(), 0
        for ready in self._ahead():
            stop = self.ranks.ask(interrupts.asked())
            taken = self._take_step(ready)
            self.step += 1
            self.position = ready.position
            images += taken
            if self.step % run.log_every == 0:
                self.clock.settle()
                self._log_steps(images, time.perf_counter() - mark)
                self.train_seconds += time.perf_counter() - mark
                self.clock.mark("other")
                mark, images = time.perf_counter(), 0
            if stop():
                interrupts.settle()
                self.train_seconds += time.perf_counter() - mark
                raise interrupts.Asked
            if run.checkpoint_steps and self.step % run.checkpoint_steps == 0 and self._inside_epoch():
                self.train_seconds += time.perf_counter() - mark
                self._save()
                self.clock.start()
                mark, images = time.perf_counter(), 0
        self.clock.settle()
        self.guard.settle()
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
        self.ranks.doing("waits for data")
        batch = next(batches, None)
        self.clock.mark("data")
        if batch is None:
            return None
        self.ranks.doing("computes")
        soft = self.sources.start(batch) if self.sources is not None and len(batch) else None
        self.clock.mark("sources")
        return _Ready(batch, soft, self.loader.state_dict())

    def _take_step(self, ready: _Ready) -> int:
        """Returns how many images, of all processes, were learned from."""
        soft = ready.soft() if ready.soft is not None else None
        self.clock.mark("sources")
        at = self._last_place = self._place()
        where = Where(self.step, self.epoch, self.position["batch"])
        losses, taken = self.stepper.take(ready.batch, soft, number=self.number, place=at, where=where)
        self._count(self.number, losses, taken)
        return ready.batch.whole or len(ready.batch)

    def _count(self, number: int, losses: dict[str, Tensor], taken: bool | Tensor) -> None:
        """Of a step that was left out, nothing; where only the device knows, it counts until the host hears of it."""
        if taken is False:
            return
        if isinstance(taken, Tensor):
            losses = {name: torch.where(taken, value, 0.0) for name, value in losses.items()}
        prefix = f"{self.method.passes[number]}/" if number else ""
        found = {prefix + name: value for name, value in losses.items()}
        if known := [name for name in found if name in self.sums]:  # stays on the device; read every N steps
            torch._foreach_add_([self.sums[name] for name in known], [found[name] for name in known])
        # copies: a recorded step returns the same memory every time
        self.sums |= {name: 0 + value for name, value in found.items() if name not in self.sums}
        self.counts |= {name: self.counts.get(name, 0) + 1 for name in found}

    def _place(self) -> int:
        """Of a step in the schedule: steps of the epoch's other passes are at the places of the first's."""
        count = len(self.loader)
        epoch, rest = divmod(self.step, count * len(self.method.passes))
        return epoch * count + rest % count

    def _end_epoch(self) -> None:
        """Evaluates, and only then is the epoch over: a run that is stopped meanwhile evaluates first when it goes on."""
        run, epoch = self.recipe.run, self.epoch + 1
        last = epoch == self.recipe.optim.epochs
        if epoch % run.eval_every == 0 or last:
            val = self.evaluate("val")
            self.schedule.heard(val["loss"])
            if run.select == "last" or val[self.metric] > self.best["value"]:
                self.best = {"epoch": epoch, "value": val[self.metric], "val": val}
                self._save_selected()
            self.log.write({"kind": "eval", "epoch": epoch, "step": self.step, "metric": self.metric} | val)
        self.epoch, self.number = epoch, 0
        self.loader.set_epoch(epoch)
        self.position = self.loader.state_dict()
        if epoch % run.checkpoint_every == 0 or last:
            self.finished = last
            self._save()

    def _preempted(self) -> interrupts.Preempted:
        """What to raise where the run was asked to end; everything up to the last step is on the disk then."""
        if not self.finished:
            self._save()
        self.ranks.doing("writes a checkpoint")
        self.writer.wait()
        return interrupts.Preempted(
            f"asked to end, after step {self.step}; the checkpoint of it is in {self.checkpoints}"
        )

    def _finish(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        found = self.ranks.first_does(lambda: checkpoint.read_summary(path) if path.is_file() else None)
        if found is not None:
            return found
        self.writer.wait()
        selected = self.checkpoints / "selected.pt"
        state = self.ranks.first_does(lambda: checkpoint.load(selected))
        checkpoint.load_target(self.target, state, selected, self.parts.dataset.classes)
        self.average = None
        test, details = evaluate_in_detail(self.parts, self.target, "test")
        bad = {split: self.ranks.all(set(loader.bad)) for split, loader in self.parts.loaders.items()}
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
            "use": self.log.use(),
            "epochs": self.epoch,
            "steps": self.step,
            "left_out_steps": self.guard.left_out,
            "processes": self.ranks.count,
            "seed": self.recipe.run.seed,
            "sources": {n.spec.name: {"model": n.spec.model, "sha256": n.sha256} for n in self.parts.networks},
            "bad_samples": {split: len(set().union(*its)) for split, its in bad.items()},
            "log": self.parts.log,
            "environment": environment(),
        }
        if self.ranks.first:
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
        self.guard.settle()
        means = {name: float(value) / self.counts[name] for name, value in self.sums.items() if self.counts[name]}
        wrong = next((v for name, v in means.items() if name.endswith("loss") and not math.isfinite(v)), None)
        if wrong is not None:
            raise self._too_high(f"the loss is {wrong} by step {self.step}")
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

    def _left_out(self, where: Where, count: int, late: bool) -> None:
        """A step whose gradient was not finite, and that may be left out."""
        if late:  # it was counted
            self.counts = {name: count - 1 for name, count in self.counts.items()}
        allowed = self.recipe.run.skip_nonfinite
        self._note(
            f"LEFT OUT: the gradient of step {where.step + 1} was not finite ({count} of {allowed} steps so far)"
        )
        self.log.write(
            {"kind": "left out", "epoch": where.epoch, "step": where.step + 1, "index": self._batch_at(where)}
        )

    def _not_finite(self, where: Where) -> ValueError:
        index = self._batch_at(where)
        path = self.folder / "nonfinite.json"
        if self.ranks.first:
            write_json(path, {"step": where.step + 1, "epoch": where.epoch, "batch": where.batch, "index": index})
        some = ", ".join(map(str, index[:8])) + (", .." if len(index) > 8 else "")
        return self._too_high(
            f"the gradient is not finite at step {where.step + 1} (epoch {where.epoch + 1}, batch {where.batch + 1} of it: "
            f"samples {some}; {path} has all), and the weights do not have it"
        )

    def _too_high(self, what: str) -> ValueError:
        back = (
            f"the last checkpoint, of step {self.saved}, is in {self.checkpoints}"
            if self.saved
            else "there is no checkpoint yet"
        )
        return ValueError(
            f"{what}; {back}. optim.lr {self.recipe.optim.lr:g} may be too high: in a new run try a lower one, warmup_epochs or "
            f"clip_norm; here run.skip_nonfinite {max(self.guard.left_out, 1)} leaves such steps out"
        )

    def _batch_at(self, where: Where) -> list[int]:
        """Indices of a step's global batch."""
        spec = self.loader.spec
        start = where.batch * spec.batch
        return (spec.epoch_order(where.epoch)[start : start + spec.batch] // spec.shows).tolist()

    def _advice(self, share: dict[str, float]) -> str:
        recalled = isinstance(self.sources, RecalledSources)
        return advise(
            share, self.recipe, self.parts.loader_name, recalled=recalled, compiled=self.parts.compile != "off"
        )

    def _note(self, text: str) -> None:
        self.watch({"kind": "note", "text": text})

    def _save(self) -> None:
        """In the background; the loop waits only until all is copied."""
        self.guard.settle()
        bad = self.ranks.all(self.loader.bad) if self.recipe.data.on_bad_sample == "skip" else []
        self.saved = self.step
        if not self.ranks.first:
            return
        self.writer.save("last.pt", self._state() | {"bad_samples": {i: why for its in bad for i, why in its.items()}})

    def _state(self) -> dict[str, Any]:
        return {
            "target": self.target.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "classes": list(self.parts.dataset.classes),
            "companions": self.method.companions.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "schedule": self.schedule.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "loader": self.position,
            "bad_samples": {},
            "dataset": self.parts.dataset.identity(),
            "position": {"epoch": self.epoch, "pass": self.number, "step": self.step, "finished": self.finished},
            "best": self.best,
            "sums": self.sums,
            "counts": self.counts,
            "left_out": self.guard.left_out,
            "times": {"clock": self.clock.seconds, "speeds": self.speeds, "train": self.train_seconds},
            "log_bytes": self.log.position() if hasattr(self, "log") else 0,
            "processes": self.ranks.count,
            "recipe": asdict(self.recipe),
        }

    def _save_selected(self) -> None:
        if not self.ranks.first:
            return
        weights = (self.average.module if self.average is not None else self.target).state_dict()
        state = {"target": weights, "classes": list(self.parts.dataset.classes), "epoch": self.epoch + 1}
        state |= {"recipe": asdict(self.recipe), "metric": self.metric, "val": self.best["val"]}
        state |= {"dataset": self.parts.dataset.identity()}
        self.writer.save("selected.pt", state)

    def _resume(self) -> int:
        """Goes to where the last checkpoint was; returns the bytes of the log it knew of."""
        self.saved = 0
        found = self.ranks.first_does(lambda: checkpoint.newest(self.checkpoints, self._note))
        if found is None:
            return 0
        path, state = found
        checkpoint.same_recipe(state["recipe"], asdict(self.recipe), self.folder)
        checkpoint.load_target(self.target, state, path, self.parts.dataset.classes)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.method.companions.load_state_dict(state["companions"])
        for optimiser, its in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(its)
        self.schedule.load_state_dict(state["schedule"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        if state["dataset"] != self.parts.dataset.identity():
            raise ValueError(f"data: {self.parts.dataset.source} has changed since the run in {self.folder} began")
        self.loader.load_state_dict(state["loader"])
        self.position = state["loader"]
        self.loader.bad |= state["bad_samples"]
        place = state["position"]
        self.epoch, self.number, self.step, self.finished = (place[k] for k in ("epoch", "pass", "step", "finished"))
        self.best, self.counts, self.saved = state["best"], state["counts"], self.step
        self.sums = {name: value.to(self.parts.device) for name, value in state["sums"].items()}
        self.guard.left_out = state.get("left_out", 0)
        times = state["times"]
        self.clock.seconds, self.speeds, self.train_seconds = times["clock"], times["speeds"], times["train"]
        self._note(f"going on from {path}: epoch {self.epoch}, step {self.step}")
        its, run, before = self.ranks, self.recipe.run, state.get("processes", 1)
        if before != its.count and run.accumulate == 1 and not run.sync_batch_norm:
            self._note(
                f"{its.count} processes instead of {before}: the batches stay the same, but batch norm sees other "
                "parts of them; run.accumulate (parts over all processes) or run.sync_batch_norm would keep that, too"
            )
        return state["log_bytes"]


def _used(folder: Path) -> int:
    """Bytes of the checkpoints that are there already."""
    return sum(path.stat().st_size for path in folder.glob("*.pt"))
