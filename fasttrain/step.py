"""One step: a batch's losses, their gradients, and what the optimiser makes of them. Several processes add theirs up."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .build import Parts
from .cosine import gradient_cosines
from .guard import FiniteGuard, Where
from .kernels import network_input
from .loaders import Batch
from .loaders.order import part_sizes
from .log import Clock
from .optim import Schedule, average_again, build_average, build_optimiser
from .ranks import Ranks
from .reduce import GradientSum, RunningStatistics
from .sources import SoftTargets
from .step_graph import Outputs, StepGraph, recorder_for
from .stragglers import WAITS


class Stepper:
    """Takes the steps of a run.

    Args:
        parts: of the run.
        ranks: its processes.
        schedule: of the learning rate.
        guard: looks at the gradients.
        clock: takes note of where the time goes.

    Attributes:
        optimisers: one for each pass over an epoch's images.
        average: the moving average of the target's weights, or None.
        mean, std: of the target's input, on the device.
        graph: takes whole steps with ``run.compile: step``, else None. The first step of a process, those with cosines, of
            later passes and of an epoch's last batch that is not full are taken without it.
    """

    def __init__(self, parts: Parts, ranks: Ranks, schedule: Schedule, guard: FiniteGuard, clock: Clock) -> None:
        recipe = parts.recipe
        self.parts, self.recipe, self.ranks, self.schedule, self.guard = parts, recipe, ranks, schedule, guard
        self.clock = clock
        self.target, self.method, self.spec = parts.target, parts.method, parts.train_spec
        self.optimisers = [
            build_optimiser(self.method.optim(number), *self.method.trained(self.target, number))
            for number in range(len(self.method.passes))
        ]
        self.average = build_average(recipe.optim, self.target)
        self.scaler = torch.amp.GradScaler(parts.device.type, enabled=parts.dtype == torch.float16)
        self.mean, self.std = (torch.tensor(v, device=parts.device) for v in (recipe.data.mean, recipe.data.std))
        self.losses = self._losses
        if parts.compile != "off":
            torch._dynamo.config.recompile_limit = 32  # sizes that grow, and an epoch's last batch
            mode = "reduce-overhead" if parts.compile == "graphs" else None
            self.losses = torch.compile(self._losses, mode=mode, dynamic=False)
        self.graph: StepGraph | None = None
        self._rates: list[Tensor] = []  # of the first optimiser's groups, on the device, as a graph needs them
        if parts.compile == "step":
            assert not ranks.several and not self.scaler.is_enabled()
            self.graph = StepGraph(self._whole_step, recorder_for(parts.device))
            self._rates = [torch.zeros((), device=parts.device) for _ in self.optimisers[0].param_groups]
            self._sent = [0.0] * len(self._rates)
        self._begun = False  # whether this process has taken a step
        self._gradients = [GradientSum(_parameters(o), ranks) for o in self.optimisers] if ranks.several else []
        self._statistics = RunningStatistics((self.target, self.method.companions), ranks, parts.device)

    def take(
        self, batch: Batch, soft: SoftTargets | None, *, number: int, place: int, where: Where
    ) -> tuple[dict[str, Tensor], bool | Tensor]:
        """One step.

        Args:
            batch: this process's share, which may be empty.
            soft: what the sources say of it.
            number: of the pass over the epoch's images.
            place: in the schedule.
            where: in the run.

        Returns:
            The losses of the whole batch, on the device (a process without a share has none); and whether the step was taken,
            as :meth:`FiniteGuard.step` says it.
        """
        whole, sizes = batch.whole or len(batch), batch.parts or ((len(batch),) if len(batch) else ())
        factor = self.schedule.rise(place) * self.schedule.factor(place)
        self._seed(where.step, 0)
        if self._is_whole(whole, sizes, number, place):
            return self._take_whole(batch, soft, factor, where)
        losses = self._cosines(batch, soft, whole) if not number and self._measures(place) and sizes else {}
        gradients = self._gradients[number] if self._gradients else None
        divided = gradients is not None or len(sizes) > 1 or self.recipe.run.skip_nonfinite > 0
        if divided:
            self._statistics.begin()
        for part, (pixels, targets, its_soft) in enumerate(_parts_of(batch, soft, sizes)):
            if self.parts.compile == "graphs":
                torch.compiler.cudagraph_mark_step_begin()
            self._seed(where.step, part)
            share = len(targets) / whole
            found = (
                self._other_losses(number, pixels, targets, self.recipe.optim.lr * factor)
                if number
                else self.losses(pixels, targets, its_soft)
            )
            loss = self.scaler.scale(found["loss"] if share == 1 else found["loss"] * share)
            if gradients is not None and part + 1 == len(sizes):
                gradients.begin()
            loss.backward(inputs=_parameters(self.optimisers[number]) if number else None)
            if self.parts.compile == "graphs" and gradients is None and part == 0 and len(sizes) > 1:
                for parameter in _parameters(self.optimisers[number]):  # what a graph gave, its next replay overwrites
                    parameter.grad = None if parameter.grad is None else parameter.grad.clone()
            if divided:
                self._statistics.after_part()
            for name, value in found.items():
                losses[name] = losses.get(name, 0) + value.detach() * share
        self.clock.mark("target")
        if divided:
            losses = self._together(gradients, whole, sizes, losses)
        taken = self._optimise(number, factor, where)
        if gradients is not None:
            gradients.clear()
        else:
            self.optimisers[number].zero_grad(set_to_none=True)
        self.clock.mark("optimiser")
        return losses, taken

    def _is_whole(self, whole: int, sizes: tuple[int, ...], number: int, place: int) -> bool:
        """Whether a step can be replayed, or recorded: it is like most others."""
        if self.graph is None or not self._begun or number or len(sizes) != 1 or self._measures(place):
            return False
        return whole == min(self.spec.batch, len(self.spec.index_N) * self.spec.shows)

    def _take_whole(
        self, batch: Batch, soft: SoftTargets | None, factor: float, where: Where
    ) -> tuple[dict[str, Tensor], bool]:
        """A step of which nothing but its inputs comes from the host. Losses of one that is left out are 0."""
        assert self.graph is not None
        self._set_rates(0, factor)
        losses, good = self.graph(batch.pixels, batch.targets, soft)
        if self.average is not None:
            self.average.n_averaged += 1
        self.clock.mark("target")
        self.guard.hear(good, where)
        return losses, True

    def _whole_step(self, pixels: Tensor, targets: Tensor, soft: SoftTargets | None) -> Outputs:
        """What the device does in such a step: the same as in :meth:`take`, of one process with one part."""
        optimiser, clip, skips = self.optimisers[0], self.recipe.optim.clip_norm, self.recipe.run.skip_nonfinite > 0
        parameters = _parameters(optimiser)
        optimiser.zero_grad(set_to_none=True)  # gradients then lie in the graph's own memory
        if skips:
            self._statistics.begin()
        found = self.losses(pixels, targets, soft)
        found["loss"].backward()
        losses = {name: value.detach() for name, value in found.items()}
        if skips:
            self._statistics.after_part()
            losses = self._statistics.finish(1, losses)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        with self._rates_on_device(0):
            good = self.guard.leave_out(optimiser, norm)
        if skips:
            self._statistics.keep_if_finite(norm)
        if self.average is not None:
            average_again(self.average, self.target)
        optimiser.zero_grad(set_to_none=True)
        counted = torch.stack(list(losses.values())).masked_fill(~good, 0.0)
        return dict(zip(losses, counted.unbind(), strict=True)), good

    def _set_rates(self, number: int, factor: float) -> None:
        """The learning rates of a step; in a run with a graph those of the first optimiser on the device, too."""
        spec, groups = self.method.optim(number), self.optimisers[number].param_groups
        for i, group in enumerate(groups):
            rate = spec.lr * factor * group.get("factor", 1.0)
            if self._rates and not number and rate != self._sent[i]:
                self._rates[i].fill_(rate)
                self._sent[i] = rate
            group["lr"] = rate

    @contextmanager
    def _rates_on_device(self, number: int) -> Iterator[None]:
        """The optimiser takes its rates from the device in the block; a checkpoint has numbers."""
        groups = self.optimisers[number].param_groups
        numbers = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates if not number else (), strict=False):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate in zip(groups, numbers, strict=True):
                group["lr"] = rate

    def close(self) -> None:
        """Lets go of the networks."""
        if self.graph is not None:
            self.graph.close()
        for gradients in self._gradients:
            gradients.close()

    def _together(
        self, gradients: GradientSum | None, whole: int, sizes: tuple[int, ...], losses: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Adds up what the parts, and the processes, have found."""
        if gradients is not None:
            self.ranks.doing(WAITS)
            if not sizes:
                gradients.begin()
            gradients.finish()
        every = part_sizes(whole, self.spec.parts or self.spec.ranks, self.spec.unit)
        losses = self._statistics.finish(sum(size > 0 for size in every), losses)
        if gradients is not None:
            self.ranks.doing("computes")
            self.clock.mark("processes")
        return losses

    def _optimise(self, number: int, factor: float, where: Where) -> bool | Tensor:
        """The optimiser's step, which is left out where the gradient is not finite; whether it was taken."""
        optimiser, clip = self.optimisers[number], self.recipe.optim.clip_norm
        self._set_rates(number, factor)
        parameters = _parameters(optimiser)
        taken: bool | Tensor = True
        if self.scaler.is_enabled():
            self._step_scaled(optimiser, clip)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            with self._rates_on_device(number):
                taken = self.guard.step(optimiser, norm, where)
            self._begun = self._begun or (not number and taken is not False)
            if self.recipe.run.skip_nonfinite:
                self._statistics.keep_if_finite(norm)
        if taken is not False and self.average is not None and not number:
            self.average.update_parameters(self.target)
        return taken

    def _step_scaled(self, optimiser: torch.optim.Optimizer, clip: float) -> None:
        """With float16 the scaler leaves such steps out by itself, and makes its scale smaller."""
        first = not optimiser.state
        self.scaler.scale(torch.zeros((), device=self.parts.device))  # a process without a part has scaled no loss yet
        if clip:
            self.scaler.unscale_(optimiser)
            torch.nn.utils.clip_grad_norm_(_parameters(optimiser), clip)
        before = self.scaler.get_scale() if first else 0.0
        self.scaler.step(optimiser)
        self.scaler.update()
        if first and self.scaler.get_scale() < before:  # PyTorch's fused SGD has then left its momentum uninitialised
            optimiser.state.clear()

    def _losses(self, pixels: Tensor, targets_B: Tensor, soft: SoftTargets | None) -> dict[str, Tensor]:
        """The forward pass, from bytes to the method's losses: what is compiled."""
        return self.method.step(self.target, network_input(pixels, self.mean, self.std), targets_B, soft)

    def _other_losses(self, number: int, pixels: Tensor, targets_B: Tensor, lr: float) -> dict[str, Tensor]:
        """Those of an epoch's later passes. They are not compiled: a compiler does not differentiate a gradient."""
        x = network_input(pixels, self.mean, self.std)
        return self.method.other_step(number, self.target, x, targets_B, lr)

    def _measures(self, place: int) -> bool:
        every = self.recipe.run.cosine_every
        return every > 0 and place % every == 0

    def _cosines(self, batch: Batch, soft: SoftTargets | None, whole: int) -> dict[str, Tensor]:
        """This process's share of the mean over the batch."""
        x = network_input(batch.pixels, self.mean, self.std)
        found = gradient_cosines(self.method, self.target, x, batch.targets, soft)
        return {f"cosine/{name}": value * (len(batch) / whole) for name, value in found.items()}

    def _seed(self, step: int, part: int) -> None:
        """Random numbers, such as dropout's, are a function of (seed, step, part of the batch)."""
        spec = self.spec
        number = spec.rank * ((spec.parts or spec.ranks) // spec.ranks) + part
        text = f"{self.recipe.run.seed} {step} {number}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
        torch.default_generator.manual_seed(seed)
        if self.parts.device.type == "cuda":
            torch.cuda.manual_seed(seed)


def _parts_of(
    batch: Batch, soft: SoftTargets | None, sizes: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor, SoftTargets | None]]:
    """A batch in parts of these sizes."""
    if len(sizes) == 1:
        yield batch.pixels, batch.targets, soft
    elif sizes:
        softs = [None] * len(sizes) if soft is None else soft.split(list(sizes))
        yield from zip(batch.pixels.split(list(sizes)), batch.targets.split(list(sizes)), softs, strict=True)


def _parameters(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimiser.param_groups for p in group["params"]]
