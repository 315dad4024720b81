"""The processes of a run, one for each device: who this one is, and what it agrees on with the others.

``torchrun`` starts them and says who they are in the environment (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT). Gradients travel over NCCL between GPUs and over Gloo between CPUs; what is agreed on travels over Gloo always, so
that it waits for no GPU. Without these variables there is one process, and all of this costs nothing.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .watchdog import Stalled

T = TypeVar("T")
_LONGER = 10  # times run.timeout
_DAYS = timedelta(days=30)  # the first process may compute labels that the others wait for; if it dies, they hear of it


class Lost(RuntimeError):
    """Another process of the run is late, or gone."""


class Elsewhere(ValueError):
    """A mistake that another process of the run has met, and tells of."""


class Ranks:
    """The processes of a run.

    Attributes:
        rank: of this one, from 0.
        count: of all.
        local, local_count: on this machine.
        late: says which process is late, for messages.
        store: what the processes share; None of one alone.
        doing: notes what this process does, for the others and for whoever watches.
        idle: notes that this process waits for something that may take long.
    """

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0, local_count: int = 1) -> None:
        self.rank, self.count, self.local, self.local_count = rank, count, local, local_count
        self.late: Callable[[], str] = lambda: ""
        self.doing: Callable[[str], None] = lambda what: None
        self.idle: Callable[[], None] = lambda: None
        self.store: dist.Store | None = None
        self._talk: Any = None  # the group that agrees, with run.timeout
        self._wait: Any = None  # the group that waits for what the first process does alone

    @property
    def first(self) -> bool:
        """Whether this process writes what a run leaves."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def agree(self, flag: bool) -> bool:
        """Whether any process says so; all have to ask."""
        if not self.several:
            return flag
        value = torch.tensor([int(flag)])
        self._do(lambda: dist.all_reduce(value, dist.ReduceOp.MAX, group=self._talk))
        return bool(value[0])

    def ask(self, flag: bool) -> Callable[[], bool]:
        """As :meth:`agree`, in the background: what it returns waits for the answer."""
        if not self.several:
            return lambda: flag
        value = torch.tensor([int(flag)])
        work = self._do(lambda: dist.all_reduce(value, dist.ReduceOp.MAX, group=self._talk, async_op=True))

        def answer() -> bool:
            self._do(work.wait)
            return bool(value[0])

        return answer

    def first_does(self, what: Callable[[], T]) -> T:
        """What the first process does alone, however long that takes, and the others get from it.

        Raises:
            ValueError: whatever mistake it met there; every process raises it.
        """
        if not self.several:
            return what()
        self.idle()
        mistake: ValueError | OSError | None = None
        told: list[Any] = [None, "", ""]  # result, what went wrong, and in which words
        if self.first:
            try:
                with _alone():
                    told[0] = what()
            except (ValueError, OSError) as error:
                mistake, told[1:] = error, ["mistake", str(error)]
            except BaseException:
                self._do(lambda: self._send([None, "end", ""]))
                raise
        result, wrong, text = self._do(lambda: self._send(told))
        if mistake is not None:
            raise mistake
        if wrong:
            raise Elsewhere(text) if wrong == "mistake" else Lost("the first process has ended")
        return result

    def same(self, what: Callable[[], T]) -> T:
        """What every process does for itself; a mistake that one of them meets, all raise.

        Raises:
            ValueError: this process's own mistake, or :class:`Elsewhere` with that of the first that met one.
        """
        if not self.several:
            return what()
        result, mistake = None, None
        try:
            result = what()
        except (ValueError, OSError) as error:
            mistake = error
        text = None if mistake is None else str(mistake)
        said = self._do(lambda: self._gathered(text, self._wait))  # one may fetch data that another has already
        if mistake is not None:
            raise mistake
        for rank, text in enumerate(said):
            if text is not None:
                raise Elsewhere(f"process {rank} of {self.count}: {text}")
        return result  # type: ignore[return-value]

    def rows(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """All processes' rows [sum of sizes, ..], on the CPU of the first one, in the order of ranks; the others get their own.

        Args:
            tensor: this process's, of ``sizes[rank]`` rows.
            sizes: rows of each process, known to all.
        """
        tensor = tensor.cpu().contiguous()
        if not self.several:
            return tensor
        kept = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
        padded = kept.new_zeros(max(sizes), *kept.shape[1:])
        padded[: len(kept)] = kept
        parts = [torch.empty_like(padded) for _ in sizes] if self.first else None
        self._do(lambda: dist.gather(padded, parts, dst=0, group=self._talk))
        if parts is None:
            return tensor
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(tensor.dtype)

    def told(self, value: T) -> T:
        """The first process's value, of plain numbers, texts, lists, dicts and tensors."""
        if not self.several:
            return value
        content = [value if self.first else None]
        self._do(lambda: dist.broadcast_object_list(content, src=0, group=self._talk))
        return content[0]  # type: ignore[return-value]

    def all(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks."""
        return self._do(lambda: self._gathered(value, self._talk)) if self.several else [value]

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.agree(False)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the first one's values, in place."""
        if self.several:
            for tensor in tensors:
                self._do(partial(dist.broadcast, tensor, src=0))

    def _send(self, content: list[Any]) -> list[Any]:
        dist.broadcast_object_list(content, src=0, group=self._wait)
        return content

    def _gathered(self, value: Any, group: Any) -> list[Any]:
        out = [None] * self.count
        dist.all_gather_object(out, value, group=group)
        return out

    def _do(self, what: Callable[[], T]) -> T:
        try:
            return what()
        except Stalled:
            raise
        except RuntimeError as error:
            raise self.lost(error) from None

    def lost(self, error: RuntimeError) -> Lost:
        """What to raise where PyTorch says that a collective has failed."""
        who = self.late() or "another process of the run has ended or does not answer"
        return Lost(f"{who} (process {self.rank} of {self.count}: {' '.join(str(error).split())[:160]})")


_HERE = Ranks()


def here() -> Ranks:
    """The processes of this run."""
    return _HERE


@contextmanager
def _alone() -> Iterator[None]:
    """What runs in the block is not shared with the other processes."""
    global _HERE
    before, _HERE = _HERE, Ranks()
    try:
        yield
    finally:
        _HERE = before


def asked() -> tuple[int, int, int, int]:
    """(rank, ranks, local rank, local ranks), as the environment says; (0, 1, 0, 1) where it says nothing.

    Raises:
        ValueError: only half of it is there, or it makes no sense.
    """
    given = os.environ
    if int(given.get("WORLD_SIZE", "1") or 1) <= 1:
        return 0, 1, 0, 1
    try:
        rank, count = int(given["RANK"]), int(given["WORLD_SIZE"])
        local = int(given["LOCAL_RANK"])
        local_count = int(given.get("LOCAL_WORLD_SIZE") or max(torch.cuda.device_count(), 1))
        given["MASTER_ADDR"], given["MASTER_PORT"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"WORLD_SIZE is {given['WORLD_SIZE']}, and {error} is not set to what goes with it: start the processes with "
            "torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT (docs/cluster.md)"
        ) from None
    if not (0 <= rank < count and 0 <= local < local_count):
        raise ValueError(f"RANK {rank} of WORLD_SIZE {count}, LOCAL_RANK {local} of LOCAL_WORLD_SIZE {local_count}")
    return rank, count, local, local_count


@contextmanager
def joined(timeout: float, cuda: bool) -> Iterator[Ranks]:
    """Joins the processes that were started together, for the block.

    Args:
        timeout: seconds after which one that does not answer is late.
        cuda: gradients will be on GPUs.

    Raises:
        ValueError: the environment is incomplete.
        Lost: not all of them came.
    """
    global _HERE
    numbers = asked()
    if numbers[1] == 1:
        yield _HERE
        return
    out = Ranks(*numbers)
    within = timedelta(seconds=timeout)
    if cuda:
        torch.cuda.set_device(out.local % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=within)
        out.store = dist.distributed_c10d._get_default_store()
        out._talk = dist.new_group(backend="gloo", timeout=within)
        out._wait = dist.new_group(backend="gloo", timeout=within)
        dist.barrier(group=out._wait)
        _set_timeout(_DAYS, out._wait)
        for group in (None, out._talk):  # the watchdog is in charge of lateness; where it is not, this is
            _set_timeout(within * _LONGER, group)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise Lost(f"not all {out.count} processes met at {place}: {' '.join(str(error).split())[:200]}") from None
    before, _HERE = _HERE, out
    try:
        yield out
    finally:
        _HERE = before
        _leave()


def _set_timeout(timeout: timedelta, group: Any) -> None:
    """For how long processes of a group wait for one another, now that all have met."""
    public = getattr(dist, "set_timeout", None)  # newer than the oldest PyTorch that will do
    (public or dist.distributed_c10d._set_pg_timeout)(timeout, group)


def _leave() -> None:
    """Without waiting for processes that may be gone."""
    with suppress(RuntimeError):
        dist.destroy_process_group()
