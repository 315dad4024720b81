"""One frozen network: built by name, its weights checked, its input made from the batch on the device."""

import difflib
import zlib

import torch
from torch import Tensor, nn

from fasttrain.kernels import network_input
from fasttrain.published import timm_network, torchvision_network
from fasttrain.recipe import Source
from fasttrain.weights import digest_of, find_file, fit, is_library_name, read_weights


class SourceNetwork(nn.Module):
    """A frozen classifier with its own input size and normalisation. No gradient, never trained.

    Attributes:
        spec: the recipe's entry.
        sha256: of its weights' file, or of its tensors where they are random.
        origin: where the weights came from, for the log.
    """

    def __init__(self, spec: Source, network: nn.Module, sha256: str, origin: str) -> None:
        super().__init__()
        self.spec, self.sha256, self.origin = spec, sha256, origin
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std), persistent=False)
        if spec.batch_norm == "batch":
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    nn.Module.train(module, True)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        mean = self.mean
        assert isinstance(mean, torch.Tensor)
        return mean.device

    def train(self, mode: bool = True) -> "SourceNetwork":
        """Stays as it is: a source is frozen."""
        return self

    @torch.no_grad()
    def forward(self, pixel_BCHW: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> logits [B, classes]; resized bilinearly to the source's own size."""
        x_BCHW = network_input(pixel_BCHW, self.mean, self.std, size=self.spec.size)  # type: ignore[arg-type]
        return self.network(x_BCHW)


def open_source(spec: Source) -> SourceNetwork:
    """Builds a source and loads its weights.

    Raises:
        ValueError: unknown network, weights that cannot be found, read or fitted, or that have another SHA-256.
    """
    library, name = _library(spec.model)
    if spec.weights == "random":
        network = _random(spec, library, name)
        sha256, origin = digest_of(network), "random"
        if not sha256.startswith(spec.sha256.lower()):
            raise ValueError(f"sources: {spec.name}'s tensors have the SHA-256 {sha256}, not {spec.sha256}")
    elif spec.weights == "default" or is_library_name(spec.weights):
        network, sha256 = _published(spec, library, name)
        origin = f"{library} {spec.weights}"
    else:
        network = _build(library, name, spec.classes)
        weights = read_weights(find_file(spec.weights, spec.sha256), spec.sha256)
        how = fit(network, weights, spec.model)
        sha256, origin = weights.sha256, f"{weights.origin} ({how})"
    return SourceNetwork(spec, network.to(memory_format=torch.channels_last), sha256, origin)


def build_network(spec: Source) -> nn.Module:
    """The source's architecture, without its weights.

    Raises:
        ValueError: unknown network.
    """
    return _build(*_library(spec.model), spec.classes)


def _library(model: str) -> tuple[str, str]:
    import timm  # both are slow to import, and a run without sources needs neither
    import torchvision

    library, _, name = model.rpartition(":")
    known = {"timm": timm.list_models(), "torchvision": torchvision.models.list_models(torchvision.models)}
    if library and library not in known:
        raise ValueError(f"sources: {model!r} names no library; write timm:NAME or torchvision:NAME")
    for candidate in [library] if library else known:
        if name.partition(".")[0] in known[candidate]:
            return candidate, name
    near = difflib.get_close_matches(name, [n for names in known.values() for n in names], 3)
    raise ValueError(
        f"sources: neither timm nor torchvision has a network called {name!r}"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def _build(library: str, name: str, classes: int) -> nn.Module:
    if library == "timm":
        import timm

        return timm.create_model(name, num_classes=classes)
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=classes)


def _random(spec: Source, library: str, name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{spec.name} {spec.model}".encode()))
        return _build(library, name, spec.classes)


def _published(spec: Source, library: str, name: str) -> tuple[nn.Module, str]:
    """The network with its library's weights, and the SHA-256 of their file."""
    try:
        if library == "timm":
            network, weights = timm_network(name, spec.sha256)
        else:
            network, weights = torchvision_network(name, spec.weights.replace("default", "DEFAULT"), spec.sha256)
    except ValueError as error:
        raise ValueError(f"sources: {spec.name}: {error}") from None
    with torch.no_grad():
        classes = network.eval()(torch.zeros(1, 3, spec.size, spec.size)).shape[1]
    if classes != spec.classes:
        raise ValueError(f"sources: {spec.name} has {classes} classes, not {spec.classes}")
    return network, weights.sha256
