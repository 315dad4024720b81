"""What the processes of a step add up: gradients, the statistics of batch norms, losses.

A batch is cut into P parts, which do not know how many processes share them (``loaders/order.py``). The loss of a part counts
by its share of the batch, so that the sum of all gradients is that of the batch. A batch norm sees its part: every part of a
step begins with the same running statistics, and the step ends with the mean of what the parts made of them. So a step is the
same on any number of processes, but for the order in which sums are taken.

Gradients are added in buckets while the backward pass is at work on the rest. (torch's DistributedDataParallel does so, too. It
deals parameters to its buckets anew after the first step, and an element's sum over four processes and more depends on where it
lies in a bucket: a run that went on would leave its curve by rounding. It also wants to be asked in the target's place, and knows
neither steps of which some processes have no part nor several optimisers.)
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ranks import Ranks

_BUCKET_BYTES = 25 << 20
_LOSSES = 64  # at most


class GradientSum:
    """Adds up the gradients of an optimiser's parameters over the processes, as they are ready.

    While it lives, ``grad`` of every parameter is a view of a bucket, which is zeroed, not freed, after a step
    (``zero_grad(set_to_none=False)``).

    Args:
        parameters: that are trained, the same in every process.
        ranks: the processes.
        bucket_bytes: of a bucket, at least.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks, bucket_bytes: int = _BUCKET_BYTES) -> None:
        self.ranks = ranks
        self._buckets: list[_Bucket] = []
        group: list[nn.Parameter] = []
        size = 0
        for parameter in reversed(parameters):  # about the order in which a backward pass is ready with them
            group.append(parameter)
            size += parameter.numel() * parameter.element_size()
            if size >= bucket_bytes:
                self._buckets.append(_Bucket(group))
                group, size = [], 0
        if group:
            self._buckets.append(_Bucket(group))
        self._number = {id(p): (b, p) for b in self._buckets for p in b.parameters}
        self._met: set[int] = set()  # parameters that have had a gradient
        self._unused: list[nn.Parameter] | None = None
        self._last, self._next = False, 0
        self._work: list[dist.Work] = []
        self._hooks = [p.register_post_accumulate_grad_hook(self._ready) for b in self._buckets for p in b.parameters]

    def begin(self) -> None:
        """Before the backward pass of a step's last part: from now on what is ready is added up."""
        self._last, self._next, self._work = True, 0, []
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """After it (or, of a process without a part, in its place): waits for the sums.

        A parameter that got no gradient in any process has None, as in one process.

        Raises:
            Lost: another process does not answer.
        """
        while self._next < len(self._buckets):
            self._send()
        self._last = False
        try:
            for work in self._work:
                work.wait()
        except RuntimeError as error:
            raise self.ranks.lost(error) from None
        if self._unused is None:  # the first process always has a part
            every = [p for b in self._buckets for p in b.parameters]
            met = self.ranks.told([id(p) in self._met for p in every])
            self._unused = [p for p, its in zip(every, met, strict=True) if not its]
        for parameter in self._unused:
            parameter.grad = None

    def clear(self) -> None:
        """After the optimiser's step."""
        for bucket in self._buckets:
            bucket.flat.zero_()
        for parameter in self._unused or ():
            bucket, _ = self._number[id(parameter)]
            parameter.grad = bucket.view(parameter)

    def close(self) -> None:
        """Lets go of the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _ready(self, parameter: Tensor) -> None:
        self._met.add(id(parameter))
        if not self._last:
            return
        bucket, _ = self._number[id(parameter)]
        bucket.missing -= 1
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:  # in the same order everywhere
            self._send()

    def _send(self) -> None:
        try:
            self._work.append(dist.all_reduce(self._buckets[self._next].flat, async_op=True))
        except RuntimeError as error:
            raise self.ranks.lost(error) from None
        self._next += 1


class _Bucket:
    """Gradients that travel together: one flat tensor, and each parameter's ``grad`` a view of it in the parameter's layout."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.missing = list(parameters), 0
        self.flat = torch.zeros(
            sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        self._at: dict[int, int] = {}
        at = 0
        for parameter in parameters:
            self._at[id(parameter)] = at
            parameter.grad = self.view(parameter)
            at += parameter.numel()

    def view(self, parameter: nn.Parameter) -> Tensor:
        return self.flat.as_strided(parameter.shape, parameter.stride(), self._at[id(parameter)])


class RunningStatistics:
    """The running means and variances of batch norms, whatever the parts of a step.

    Args:
        networks: whose batch norms these are.
        ranks: the processes.
        device: of the networks.
    """

    def __init__(self, networks: Iterable[nn.Module], ranks: Ranks, device: torch.device) -> None:
        norms = [m for n in networks for m in n.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.ranks, self.device = ranks, device
        self._modules = [m for m in norms if m.track_running_stats and m.running_mean is not None]
        self._start: list[Tensor] = []
        self._sum: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._flat: Tensor | None = None

    @property
    def values(self) -> list[Tensor]:
        """As they are in the networks now."""
        return [t for m in self._modules for t in (m.running_mean, m.running_var) if t is not None]

    @property
    def counters(self) -> list[Tensor]:
        """Steps counted by the batch norms."""
        return [m.num_batches_tracked for m in self._modules if m.num_batches_tracked is not None]

    def begin(self) -> None:
        """Before a step's first part, networks in training mode."""
        if self._flat is None:
            self._modules = [m for m in self._modules if m.training]  # those of frozen sections keep what they have
            values = self.values
            sizes = [v.numel() for v in values]
            self._flat = torch.zeros(sum(sizes) + _LOSSES, device=self.device)
            views = self._flat[:-_LOSSES].split(sizes) if sizes else ()
            self._sum = [view.view_as(v) for view, v in zip(views, values, strict=True)]
            self._start = [torch.empty_like(v) for v in values]
            self._counts = [torch.empty_like(c) for c in self.counters]
        self._flat.zero_()
        _copy(self._start, self.values)
        _copy(self._counts, self.counters)

    def after_part(self) -> None:
        """After the forward pass of a part: notes what it made of the statistics, and takes it back."""
        if self._sum:
            torch._foreach_add_(self._sum, self.values)
        _copy(self.values, self._start)

    def finish(self, parts: int, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """After a step's last part: the mean over the parts of all processes.

        Args:
            parts: of the whole batch, those that are not empty.
            losses: this process's share of the batch's, scalars; empty where it had no part.

        Returns:
            The batch's losses; of a process without a part none.

        Raises:
            Lost: another process does not answer.
        """
        assert self._flat is not None and len(losses) <= _LOSSES
        tail = self._flat[-_LOSSES:]
        if losses:
            tail[: len(losses)] = torch.stack([v.detach().float() for v in losses.values()])
        if self.ranks.several:
            try:
                dist.all_reduce(self._flat)
            except RuntimeError as error:
                raise self.ranks.lost(error) from None
        if self._sum and parts > 1:
            torch._foreach_div_(self._sum, float(parts))
        _copy(self.values, self._sum)
        if self._counts:  # one step, however many parts
            limits = list(torch._foreach_add(self._counts, 1))
            _copy(self.counters, limits) if not losses else torch._foreach_minimum_(self.counters, limits)
        return dict(zip(losses, tail.clone().unbind(), strict=False))

    def keep_if_finite(self, measure: Tensor) -> None:
        """Takes the step's statistics back, on the device, where ``measure`` is not finite."""
        good = torch.isfinite(measure)
        for value, start in zip(self.values, self._start, strict=True):
            value.copy_(torch.where(good, value, start))
        for counter, count in zip(self.counters, self._counts, strict=True):
            counter.copy_(torch.where(good, counter, count))


def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, of)
