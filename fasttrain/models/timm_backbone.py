"""Any of timm's networks that gives feature maps (``features_only``), as a backbone: ``timm:NAME``.

Nothing in timm says where its networks begin and end their stages, which sizes they take, or what of a classifier's tensors
their feature networks keep. It is found by running the network on the meta device, and from the tensors' names.
"""

import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fasttrain.published import timm_network
from fasttrain.weights import Weights, fit

from .backbone import Backbone, Maps

PREFIX = "timm:"


class TimmBackbone(Backbone):
    """Taps are the maps that timm's ``features_only`` gives, shallow to deep; the last of them is pooled.

    What timm's classifier has after the last map (a further convolution, for some) is left out. Section i holds what tap i
    needs and no tap before it: the stem alone where timm taps that, or with the first stage.

    A transfer module's width is 1000, as in the SSKT paper's code for all networks for large images.

    Args:
        model: timm's name of it, such as ``resnet50`` or ``tf_efficientnet_lite0.in1k``.

    Raises:
        ValueError: timm has no such network, or it gives no feature maps.
    """

    transfer_width = 1000
    library = "timm"

    def __init__(self, model: str) -> None:
        super().__init__()
        import timm  # slow to import, and others do without

        if not timm.is_model(model):
            near = difflib.get_close_matches(model, timm.list_models(), 3)
            raise ValueError(
                f"target.model: timm has no network called {model!r}"
                + (f"; did you mean {' or '.join(PREFIX + n for n in near)}?" if near else "")
            )
        self.model, self.name = model, PREFIX + model
        try:
            network: Any = timm.create_model(model, features_only=True)
            self.network: nn.Module = network
            self._made_for = tuple(network.pretrained_cfg["input_size"][1:])
            self.tap_channels = tuple(network.feature_info.channels())
            taps, state = self._on_meta(*self._made_for)
        except Exception as error:  # each network has its own way to fail
            raise ValueError(
                f"target.model: {self.name} cannot be a backbone ({_short(error)}); choose one that offers features_only"
            ) from None
        of_axis = [tuple(tap.shape[axis] for tap in taps) for axis in (1, 3)]
        assert self.tap_channels in of_axis, (of_axis, self.tap_channels)
        self._channels_at_the_end = of_axis[0] != self.tap_channels
        self.feature_dim = self.tap_channels[-1]
        self.sections = _sections(self, taps, {id(state[n]): p for n, p in self.network.named_parameters()})

    def forward(self, pixel_BCHW: Tensor) -> Maps:
        try:
            taps = self.network(pixel_BCHW)
        except (AssertionError, RuntimeError):
            self.check_size(pixel_BCHW.shape[2], pixel_BCHW.shape[3])
            raise  # it was not the size
        if self._channels_at_the_end:
            taps = [tap.permute(0, 3, 1, 2) for tap in taps]
        return taps, taps[-1]

    def check_size(self, height: int, width: int) -> None:
        reason = self._misfit(height, width)
        if not reason:
            return
        fits = max(self._made_for)
        low = max(height, width)
        while low + 1 < fits:  # low does not fit, fits does
            middle = (low + fits) // 2
            low, fits = (middle, fits) if self._misfit(middle, middle) else (low, middle)
        raise ValueError(
            f"data.size: {self.name} cannot take images of {height} x {width} pixels ({reason}); {fits} fits"
            + (f", and it was made for {max(self._made_for)}" if fits != max(self._made_for) else "")
        )

    def own_tensors(self, weights: Weights) -> tuple[dict[str, Tensor], str]:
        """Those of timm's whole network, by its names, or in its order under other names."""
        import timm

        with torch.random.fork_rng(devices=[]):
            full = timm.create_model(self.model, num_classes=_classes_in(weights, timm.get_pretrained_cfg(self.model)))
        how = fit(full, weights, self.name)
        return self._of_full(full), how

    def published(self, name: str, sha256: str = "") -> Weights:
        """timm's own weights of the whole network.

        Args:
            name: ``DEFAULT``; of several, timm's network names say which.
            sha256: of their file (or its first digits), see :func:`fasttrain.published.timm_network`.

        Raises:
            ValueError: another name, weights that are not here or cannot be fetched, or another SHA-256.
        """
        if name != "DEFAULT":
            raise ValueError(f"{name!r}: timm's weights are chosen by target.model, as in {self.name}.TAG; say DEFAULT")
        with torch.random.fork_rng(devices=[]):
            full, weights = timm_network(self.model, sha256)
        return Weights(full.state_dict(), weights.sha256, "timm")

    def _of_full(self, full: nn.Module) -> dict[str, Tensor]:
        """Tensors of timm's whole network, by their names here: for features, timm puts it into a module called ``model`` or
        ``body``, or takes the first modules out of theirs and joins the names by ``_``."""
        of_full = {name.replace(".", "_"): tensor for name, tensor in full.state_dict().items()}
        given = {}
        for name in self.network.state_dict():
            for theirs in (name, name.removeprefix("model.").removeprefix("body.")):
                if (tensor := of_full.get(theirs.replace(".", "_"))) is not None:
                    given[f"network.{name}"] = tensor
                    break
        return given

    def _on_meta(self, height: int, width: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Maps of two images, without their numbers but with their graph, and the tensors of the network at its leaves."""
        own = [*self.network.named_parameters(), *self.network.named_buffers()]
        state = {n: t.detach().to("meta").requires_grad_(isinstance(t, nn.Parameter)) for n, t in own}
        training = self.network.training
        with torch.enable_grad():
            taps = functional_call(self.network.eval(), state, torch.empty(2, 3, height, width, device="meta"))
        self.network.train(training)
        return taps, state

    def _misfit(self, height: int, width: int) -> str:
        """Why it cannot take images of this size; empty if it can."""
        try:
            taps, _ = self._on_meta(height, width)
        except Exception as error:  # each network has its own way to fail
            return _short(error)
        return "" if all(tap.numel() for tap in taps) else "nothing is left of its last map"


def _sections(network: nn.Module, taps: list[Tensor], leaves: dict[int, nn.Parameter]) -> tuple[tuple[str, ...], ...]:
    """Names of the largest submodules (or parameters) all of whose parameters are first needed by the same tap.

    Args:
        network: all of it.
        taps: with their graph.
        leaves: the network's parameters, by the ids of the graph's leaves.
    """
    first: dict[nn.Parameter, int] = {}
    seen: set[Any] = set()
    for i, tap in enumerate(taps):
        nodes = [tap.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                first[leaves[id(node.variable)]] = i
    sections: list[list[str]] = [[] for _ in taps]

    def divide(name: str, module: nn.Module) -> None:
        needed = {first.get(p, len(taps) - 1) for p in module.parameters()}  # what no tap needs goes to the last
        if len(needed) == 1:
            sections[needed.pop()].append(name)
            return
        for n, p in module.named_parameters(name, recurse=False):
            sections[first.get(p, len(taps) - 1)].append(n)
        for n, child in module.named_children():
            divide(f"{name}.{n}", child)

    for name, module in network.named_children():
        divide(name, module)
    return tuple(tuple(names) for names in sections if names)


def _classes_in(weights: Weights, config: Any) -> int:
    """Of the classifier in a file: by its name, else the length of the last tensor, its bias; 0 where timm's network has none."""
    if not config.num_classes:
        return 0
    names = [config.classifier] if isinstance(config.classifier, str) else list(config.classifier or ())
    of_classifier = [weights.tensors[f"{n}.weight"] for n in names if f"{n}.weight" in weights.tensors]
    (last,) = of_classifier[:1] or list(weights.tensors.values())[-1:]
    return last.shape[0] if last.dim() else config.num_classes


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
