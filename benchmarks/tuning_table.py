"""Single changes to a training step, each with the ratio to its base that was predicted before anybody had run it on a GPU.

The predictions are of 2026-11-22, for one NVIDIA H200 with 16 CPU cores, made from counted arithmetic and bytes
(`fasttrain bench floors` at 790 TFLOP/s and 4.2 TB/s) and from guesses, which ``why`` names: that convolutions reach about
half of these rates, and that the host needs about 10 us for each kernel that it launches. They are not changed afterwards:
what came out otherwise is said in NOTES.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A change.

    Attributes:
        name: in words.
        predicted: images a second, relative to the base's.
        why: a sentence.
        options: of `fasttrain bench step` that are other than the base's.
        fields: of the recipe that are.
        environment: variables of its process.
    """

    name: str
    predicted: float
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """Changes to one base.

    Attributes:
        name: on the command line.
        row: of `fasttrain bench step`.
        base: its options.
        variants: the changes.
        fields: of the base's recipe.
    """

    name: str
    row: str
    base: Mapping[str, Any]
    variants: tuple[Variant, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """The largest that is predicted."""
        return max(v.predicted for v in self.variants)


LARGE: dict[str, Any] = {
    "target": "resnet18",
    "size": 224,
    "batch": 512,
    "images": 1024,
    "source_size": 224,
    "frames": 0,
}
LARGE |= {
    "models": ["torchvision:resnet50", "torchvision:resnet50"],
    "module": True,
    "loader": "auto",
    "compile": "true",
}
SMALL = LARGE | {"target": "resnet20", "size": 32, "batch": 128}
# what auto is today, said so that sweeps share their bases' processes, and keep their meaning
PLAIN, COMPILED = {"transfer.together": "plain"}, {"transfer.bank": "compiled"}

SWEEPS = (
    Sweep(
        "compile-small",
        "recalled",
        SMALL,
        (
            Variant(
                "off",
                0.5,
                "Launches are the limit, and eager mode has about twice as many as fused kernels have.",
                {"compile": "false"},
            ),
            Variant(
                "graphs",
                2.0,
                "Forward and backward are two launches then; the optimiser, the lookup and the loader's kernels remain.",
                {"compile": "graphs"},
            ),
            Variant(
                "step",
                3.0,
                "One launch: what remains are some 250 kernels of about 3 us, and the copies into the graph's memory.",
                {"compile": "step"},
            ),
        ),
    ),
    Sweep(
        "compile",
        "recalled",
        LARGE,
        (
            Variant(
                "off",
                0.8,
                "Batch norms, activations and sums are passes of their own over memory, about 14 ms beside a step of 60.",
                {"compile": "false"},
            ),
            Variant(
                "graphs",
                1.0,
                "Kernels take longer than their launches, so the host is ahead already.",
                {"compile": "graphs"},
            ),
            Variant("step", 1.0, "The same reason as of graphs.", {"compile": "step"}),
            Variant(
                "max-autotune",
                1.02,
                "Triton's templates beat cuDNN for some 1x1 convolutions only, and these are a part of the time.",
                environment={"TORCHINDUCTOR_MAX_AUTOTUNE": "1"},
            ),
        ),
        PLAIN,
    ),
    Sweep(
        "bank",
        "live",
        LARGE,
        (
            Variant(
                "plain",
                0.78,
                "Batch norms and activations are passes of their own: the sources' share of a step, about half, takes 1.5 times "
                "as long.",
                fields={"transfer.bank": "plain"},
            ),
            Variant(
                "folded",
                0.88,
                "Without batch norms' passes, but with those of activations and sums.",
                fields={"transfer.bank": "folded"},
            ),
            Variant(
                "stacked",
                0.65,
                "cuDNN's grouped convolutions are slower than two plain ones, in channels_last above all.",
                fields={"transfer.bank": "stacked"},
            ),
            Variant(
                "graphed",
                0.88,
                "The same kernels as folded, whose launches are hidden at this batch.",
                fields={"transfer.bank": "graphed"},
            ),
        ),
        COMPILED,
    ),
    Sweep(
        "precision",
        "live",
        LARGE,
        (
            Variant(
                "sources in bf16",
                1.0,
                "The same tensor cores, the same bytes.",
                fields={"transfer.precision": "bf16"},
            ),
            Variant(
                "sources in fp32",
                0.62,
                "TF32 has half the rate and twice the bytes: the sources' share of a step, about half, doubles and more.",
                fields={"transfer.precision": "fp32"},
            ),
            Variant(
                "target in fp16",
                0.99,
                "The same rate; the scaler looks at every gradient once more.",
                fields={"run.precision": "fp16"},
            ),
            Variant(
                "all in fp32",
                0.45,
                "Half the rate and twice the bytes for all of it, and layers that PyTorch does not compute in TF32 by itself.",
                fields={"run.precision": "fp32"},
            ),
        ),
        COMPILED,
    ),
    Sweep(
        "batch",
        "recalled",
        LARGE,
        (
            Variant(
                "64",
                0.85,
                "The last stages have too few tiles for 132 multiprocessors, and launches begin to show.",
                {"batch": 64},
            ),
            Variant("128", 0.92, "As with 64, by half.", {"batch": 128}),
            Variant("256", 0.97, "As with 128, by half.", {"batch": 256}),
            Variant("1024", 1.01, "The multiprocessors are full at 512 already.", {"batch": 1024}),
            Variant("2048", 1.02, "As with 1024.", {"batch": 2048, "images": 2048}),
        ),
        PLAIN,
    ),
    Sweep(
        "together",
        "recalled",
        LARGE,
        (
            Variant(
                "shared",
                1.05,
                "Each tap is read once for both sources, by products twice as wide.",
                fields={"transfer.together": "shared"},
            ),
            Variant(
                "shared, padded",
                1.04,
                "1024 channels for 1000: 2.4 % more arithmetic, in tiles that were cut as large before.",
                fields={"transfer.together": "shared", "transfer.pad_to": 64},
            ),
            Variant(
                "grouped",
                0.7,
                "cuDNN's grouped convolutions are slower than plain ones, above all backward.",
                fields={"transfer.together": "grouped"},
            ),
            Variant(
                "grouped, padded",
                0.75,
                "As grouped; channels that are multiples of 64 allow better kernels.",
                fields={"transfer.together": "grouped", "transfer.pad_to": 64},
            ),
            Variant(
                "recomputed",
                0.8,
                "The modules' forward pass, 26 % of a step's arithmetic, is taken twice.",
                fields={"transfer.recompute": "true"},
            ),
        ),
        PLAIN,
    ),
    Sweep(
        "optimiser",
        "recalled",
        LARGE,
        (
            Variant(
                "apex",
                1.0,
                "The optimiser's bytes are 0.2 ms of a step, by either one fused kernel.",
                fields={"optim.impl": "apex"},
            ),
        ),
        PLAIN,
    ),
    Sweep(
        "layout",
        "recalled",
        LARGE,
        (
            Variant(
                "NCHW",
                0.6,
                "Tensor cores want NHWC: cuDNN turns every convolution's tensors around, there and back.",
                fields={"run.channels_last": "false"},
            ),
        ),
        PLAIN,
    ),
    Sweep(
        "loader",
        "recalled",
        LARGE | {"loader": "ffcv"},
        (
            Variant(
                "8 workers",
                1.0,
                "A core serves about 1,500 images a second (docs/data.md, another CPU), and a step takes about 8,500.",
                fields={"data.workers": 8},
            ),
            Variant("4 workers", 0.74, "4 x 1,500 for 8,500.", fields={"data.workers": 4}),
            Variant("2 workers", 0.37, "2 x 1,500 for 8,500.", fields={"data.workers": 2}),
        ),
    ),
)
