"""A gradient that is not finite does not reach the weights: the step is left out, and the run stops or goes on as asked."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BEHIND = 4  # steps by which a GPU may be behind the host before its flag is waited for


@dataclass(frozen=True)
class Where:
    """A step: its number, its epoch, and the number of its batch in there, all from 0."""

    step: int
    epoch: int
    batch: int


class FiniteGuard:
    """Looks at the norm of each step's gradient.

    On a GPU the host does not wait for the answer: the optimiser's kernel leaves the step out by itself, and the host hears of
    it a few steps later. It waits at an optimiser's first step alone: PyTorch's kernel would leave that out, too, but keep the
    memory of a momentum that was never written.

    Args:
        device: of the gradients.
        allowed: steps to leave out, in the whole run.
        tell: called for each step that was left out and is allowed, with its place, how many there have been, and whether
            :meth:`step` has returned without knowing.
        stop: makes what is raised for one too many.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        allowed: int,
        tell: Callable[[Where, int, bool], None],
        stop: Callable[[Where], Exception],
    ) -> None:
        self._cuda = device.type == "cuda"
        self._allowed, self._tell, self._stop = allowed, tell, stop
        self.left_out = 0
        self._waiting: deque[tuple[Where, Tensor, Any]] = deque()
        self._unused: list[tuple[Tensor, Any]] = []  # flags and events that were waited for

    def step(self, optimiser: torch.optim.Optimizer, measure: Tensor, where: Where) -> bool | Tensor:
        """Takes the optimiser's step if ``measure``, a scalar, is finite; whether it was taken: where only the device knows, as
        a tensor there.

        Raises:
            Exception: what ``stop`` makes.
        """
        if not self._cuda or _has_to_begin(optimiser):
            if bool(torch.isfinite(measure)):
                optimiser.step()
                return True
            self._found(where, False)
            return False
        good = self.leave_out(optimiser, measure)
        self.hear(good, where)
        return good

    def leave_out(self, optimiser: torch.optim.Optimizer, measure: Tensor) -> Tensor:
        """Takes the optimiser's step, which its kernel leaves out by itself where ``measure`` is not finite; whether it was
        taken, on the device. Its momentum has begun, and :meth:`hear` has to be told."""
        good = torch.isfinite(measure)
        bad = (~good).float()
        if hasattr(optimiser, "_step_supports_amp_scaling"):
            optimiser.grad_scale, optimiser.found_inf = None, bad  # type: ignore[attr-defined]
            optimiser.step()
            del optimiser.grad_scale, optimiser.found_inf  # type: ignore[attr-defined]
        elif not bool(bad):
            optimiser.step()
        return good

    def hear(self, good: Tensor, where: Where) -> None:
        """Takes note of a step's flag, which the host reads some steps later.

        Raises:
            Exception: what ``stop`` makes, of an earlier step.
        """
        if self._cuda:
            flag, event = self._unused.pop() if self._unused else (_pinned_flag(), torch.cuda.Event())
            flag.copy_(good, non_blocking=True)
            event.record()
        else:
            flag, event = good.clone(), None
        self._waiting.append((where, flag, event))
        self.settle(_BEHIND)

    def settle(self, behind: int = 0) -> None:
        """Hears of all steps but the last ``behind``."""
        while len(self._waiting) > behind:
            where, flag, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
                self._unused.append((flag, event))
            if not flag:
                self._found(where, True)

    def _found(self, where: Where, late: bool) -> None:
        self.left_out += 1
        if self.left_out > self._allowed:
            raise self._stop(where)
        self._tell(where, self.left_out, late)


def _pinned_flag() -> Tensor:
    return torch.empty((), dtype=torch.bool, pin_memory=True)


def _has_to_begin(optimiser: torch.optim.Optimizer) -> bool:
    """Whether its next step is the first that makes a momentum."""
    return not optimiser.state and any(group["momentum"] for group in optimiser.param_groups)
