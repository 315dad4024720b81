"""Live sources: all frozen networks, run on every batch, on a GPU in one stream of their own, beside the target's step.

Shape suffixes: B batch, C all sources' classes side by side, M sources.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fasttrain.kernels import network_input
from fasttrain.loaders import Batch

from .fold import folded
from .network import SourceNetwork
from .soft_targets import SoftTargets

Strategy = Literal["auto", "plain", "folded", "compiled", "stacked", "graphed"]
STRATEGIES = ("plain", "folded", "compiled", "stacked", "graphed")
CHUNK = 16  # images that a CPU shows to a source at once
Take = Callable[[], SoftTargets]


class SourceBank:
    """Runs frozen networks as fast as this machine can.

    Strategies, of which each has what the ones before it have, except where it says so:

    * ``plain``: one after the other under autocast, as they were built, each with an input of its own.
    * ``folded``: batch norms folded into convolutions, weights kept in ``dtype``.
    * ``compiled``: torch.compile over all of them together, inputs included.
    * ``stacked``: not compiled; networks of one architecture run as one with grouped convolutions (``torch.func``).
    * ``graphed``: not compiled; a CUDA graph of them all is replayed. CUDA only.
    * ``auto``: on a CPU folded; on CUDA compiled or graphed, by ``compiles``.

    Sources that ask for the same size and normalisation share one input. Where a source has ``batch_norm: batch``, ``auto``
    is plain, and whole batches are shown.

    A CPU shows every source ``CHUNK`` images at once, the last ones repeated to fill a chunk: what a source says of an image
    then depends on nothing else, neither the batch around it nor its size, to the last bit (on the same machine, with the
    same number of threads).

    Args:
        networks: on the batches' device, with names that differ.
        dtype: of the arithmetic.
        strategy: one of the above.
        compiles: whether ``auto`` may take the time to compile.
        report: takes a line on what could not be done.

    Attributes:
        strategy: the one that runs.
        one_shape: whether batches of many shapes are dear to it.

    Raises:
        ValueError: a strategy that cannot run here or with these networks; later, logits that are no numbers.
    """

    def __init__(
        self,
        networks: Sequence[SourceNetwork],
        dtype: torch.dtype,
        *,
        strategy: Strategy = "auto",
        compiles: bool = False,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.networks, self.dtype = list(networks), dtype
        self.class_counts = tuple(n.spec.classes for n in networks)
        self.names = tuple(n.spec.name for n in networks)
        self.device, self._seen = networks[0].device, False
        self._whole = self.device.type != "cpu" or any(n.spec.batch_norm == "batch" for n in networks)
        self.strategy = chosen_strategy(strategy, self.networks, compiles)
        self._run: Callable[[Tensor], list[Tensor]]
        if self.strategy == "plain":
            self._run = self._plain
        else:
            prepared = [_prepared(n, dtype, report) for n in networks]
            together = _Stack(prepared, self.networks) if self.strategy == "stacked" else None
            self._run = _Shared(self.networks, prepared, together, dtype)
            if self.strategy == "compiled":
                self._run = torch.compile(self._run, dynamic=False)
            elif self.strategy == "graphed":
                self._run = _Graphs(self._run)
        self.one_shape = self._whole and self.strategy in ("compiled", "graphed")
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, batch: Batch) -> SoftTargets:
        """Soft targets of a batch, from its ``still`` view where it has one, else from the target's pixels (a clip's centre
        frame)."""
        return self._soft(self.logits(_shown(batch)))

    def start(self, batch: Batch) -> Take:
        """Queues the work for a batch in the bank's own stream, after what is queued in the current one so far.

        Returns:
            What makes the current stream (not the host) wait for the soft targets, and returns them.
        """
        if self.stream is None:
            return lambda: self(batch)
        pixels, own = _shown(batch), self.stream
        own.wait_stream(torch.cuda.current_stream(self.device))  # where the batch is made
        with torch.cuda.stream(own):
            logits_BC = self.logits(pixels)
            done = own.record_event()
        pixels.record_stream(own)

        def take() -> SoftTargets:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            logits_BC.record_stream(current)
            return self._soft(logits_BC)

        return take

    def logits(self, pixel_BCHW: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> logits of all sources side by side [B, C], in the current stream."""
        with torch.inference_mode():
            parts = self._run(pixel_BCHW) if self._whole else _by_chunks(self._run, pixel_BCHW)
        if not self._seen:  # only once, as the host waits for it
            self._seen = True
            for name, logits in zip(self.names, parts, strict=True):
                check_finite(name, logits)
        return torch.cat(parts, dim=1)  # a copy that autograd may keep

    def describe(self) -> str:
        """One line for the run's log."""
        return f"live, at every step, in {str(self.dtype).removeprefix('torch.')}, {self.strategy}"

    def close(self) -> None:
        """Nothing is held open."""

    def _plain(self, pixel_BCHW: Tensor) -> list[Tensor]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return [network(pixel_BCHW) for network in self.networks]

    def _soft(self, logits_BC: Tensor) -> SoftTargets:
        return SoftTargets(logits_BC, self.class_counts, self.names)


def check_finite(name: str, logits: Tensor) -> None:
    """Looks for what float16 cannot hold.

    Raises:
        ValueError: there is some.
    """
    if not bool(logits.isfinite().all()):
        raise ValueError(
            f"sources: {name} says what is no number"
            + (
                "; float16 may be too small for it: set transfer.precision bf16"
                if logits.dtype == torch.float16
                else ""
            )
        )


def _shown(batch: Batch) -> Tensor:
    return batch.images if batch.still is None else batch.still


def chosen_strategy(strategy: str, networks: list[SourceNetwork], compiles: bool) -> str:
    """The strategy that runs; see :class:`SourceBank`.

    Raises:
        ValueError: one that cannot run here.
    """
    device, drifts = networks[0].device, [n.spec.name for n in networks if n.spec.batch_norm == "batch"]
    if strategy == "auto":
        return "plain" if drifts else "folded" if device.type == "cpu" else "compiled" if compiles else "graphed"
    if strategy not in STRATEGIES:
        raise ValueError(f"transfer.bank: {strategy!r} is none of auto, {', '.join(STRATEGIES)}")
    if strategy == "graphed" and device.type != "cuda":
        raise ValueError("transfer.bank: graphed needs a CUDA device")
    if strategy != "plain" and drifts:
        raise ValueError(f"transfer.bank: {drifts[0]} has batch_norm: batch, which only plain has")
    return strategy


def _prepared(source: SourceNetwork, dtype: torch.dtype, report: Callable[[str], None]) -> nn.Module:
    """The network with its batch norms folded and its weights in ``dtype``."""
    side = source.spec.size
    example = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    # on the CPU, where float32 is float32
    network, count = folded(copy.deepcopy(source.network).cpu(), example.contiguous(memory_format=torch.channels_last))
    if not count and any(isinstance(m, nn.BatchNorm2d) for m in network.modules()):
        report(f"source {source.spec.name}: its batch norms cannot be folded into convolutions")
    return network.to(source.device, dtype)


class _Shared(nn.Module):
    """uint8 pixels -> each source's logits; an input is made once for all sources that want the same."""

    def __init__(self, sources: list[SourceNetwork], prepared: list[nn.Module], stack: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.prepared, self.stack, self.dtype = nn.ModuleList(prepared), stack, dtype
        wanted = [_input_of(s) for s in sources]
        self.inputs = list(dict.fromkeys(wanted))
        self.input_of = [self.inputs.index(w) for w in wanted]
        for i, (_, mean, std) in enumerate(self.inputs):
            self.register_buffer(f"mean{i}", torch.tensor(mean, device=sources[0].device))
            self.register_buffer(f"std{i}", torch.tensor(std, device=sources[0].device))

    def forward(self, pixel_BCHW: Tensor) -> list[Tensor]:
        x = [
            network_input(pixel_BCHW, getattr(self, f"mean{i}"), getattr(self, f"std{i}"), size=size, dtype=self.dtype)
            for i, (size, _, _) in enumerate(self.inputs)
        ]
        if self.stack is not None:
            return self.stack(x[0])
        return [network(x[i]) for network, i in zip(self.prepared, self.input_of, strict=True)]


def _input_of(source: SourceNetwork) -> tuple:
    return source.spec.size, tuple(source.spec.mean), tuple(source.spec.std)


class _Stack:
    """Networks of one architecture as one: their tensors stacked, mapped over by ``torch.func.vmap``.

    Where tensors differ in length only because the class counts do, the shorter ones are filled with zeros.
    """

    def __init__(self, prepared: list[nn.Module], sources: list[SourceNetwork]) -> None:
        states = [dict(n.named_parameters()) | dict(n.named_buffers()) for n in prepared]
        models, inputs = {s.spec.model for s in sources}, {_input_of(s) for s in sources}
        if len(models) > 1 or len(inputs) > 1:
            raise ValueError(
                f"transfer.bank: stacked needs sources of one architecture with one input, not {sorted(models)}"
            )
        self.classes, self.shape = [s.spec.classes for s in sources], prepared[0]
        self.state = {name: torch.stack(_level([s[name] for s in states])) for name in states[0]}

    def __call__(self, x_BCHW: Tensor) -> list[Tensor]:
        def run(state, x):
            return torch.func.functional_call(self.shape, state, (x,))

        logits_MBC = torch.func.vmap(run, in_dims=(0, None))(self.state, x_BCHW)
        return [logits_BC[:, :c] for logits_BC, c in zip(logits_MBC, self.classes, strict=True)]


def _level(tensors: list[Tensor]) -> list[Tensor]:
    rows = max(t.shape[0] for t in tensors) if tensors[0].dim() else 0
    return [
        torch.cat([t, t.new_zeros(rows - len(t), *t.shape[1:])]) if t.dim() and len(t) < rows else t for t in tensors
    ]


class _Graphs:
    """A CUDA graph for the first shape that comes; other shapes (an epoch's last batch) run as they are."""

    def __init__(self, run: Callable[[Tensor], list[Tensor]]) -> None:
        self._run = run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: Tensor | None = None
        self._made: list[Tensor] = []

    def __call__(self, pixel_BCHW: Tensor) -> list[Tensor]:
        if self._given is None:
            self._record(pixel_BCHW)
        assert self._given is not None
        if pixel_BCHW.shape != self._given.shape:
            return self._run(pixel_BCHW)
        self._given.copy_(pixel_BCHW)
        assert self._graph is not None
        self._graph.replay()
        return self._made  # copied by the caller before the next replay in the same stream

    def _record(self, pixel_BCHW: Tensor) -> None:
        self._given = pixel_BCHW.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run(self._given)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # loaders' threads may work meanwhile
            self._made = self._run(self._given)


def _by_chunks(run: Callable[[Tensor], list[Tensor]], pixel_BCHW: Tensor) -> list[Tensor]:
    """Runs ``CHUNK`` images at a time; the last chunk is filled with its last image."""
    parts = []
    for chunk in pixel_BCHW.split(CHUNK):
        short = CHUNK - len(chunk)
        filled = torch.cat([chunk, chunk[-1:].expand(short, -1, -1, -1)]) if short else chunk
        parts.append([logits[: len(chunk)] for logits in run(filled)])
    return [torch.cat(each) for each in zip(*parts, strict=True)]
