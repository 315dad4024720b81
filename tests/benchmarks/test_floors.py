"""The least that a step's convolutions and matrix products take: counted by hand, and as `describe` counts them."""

import pytest
import torch
from fasttrain.benchmarks.floors import Operation, floor, forward, rows, run, training
from fasttrain.benchmarks.step_options import recipe
from torch import nn

from fasttrain.describe import describe
from fasttrain.models.target import TargetOutput

ASKED = {"target": "resnet20", "models": ["test_resnet"], "module": True, "size": 24, "source_size": 32, "batch": 8,
         "frames": 0, "file": None, "folder": "runs"}  # fmt: skip


class _Small(nn.Module):
    """A convolution, a strided grouped one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.second = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x, aux=False):
        x = self.second(self.first(x).relu()).mean((2, 3))
        return TargetOutput(self.head(x), None)


def test_a_small_network_by_hand():
    """6 x 6 pixels, batch 2, 2 bytes a number."""
    with torch.device("meta"):
        network = _Small()
    operations = training(network, (3, 6, 6), 2, aux=False, itemsize=2)
    pixels, half = 2 * 6 * 6, 2 * 3 * 3
    x, a, b = 3 * pixels, 4 * pixels, 8 * half  # numbers before, between and after the convolutions
    w1, w2, w3 = 4 * 3 * 9, 8 * 2 * 9, 5 * 8
    first, second, head = 2 * a * 27, 2 * b * 18, 2 * 2 * w3
    expected = [
        ("target forward", first, 2 * (x + w1 + a)),
        ("target forward", second, 2 * (a + w2 + b)),
        ("target forward", head, 2 * (16 + w3 + 10)),
        ("target backward", head, 2 * (16 + w3 + 10)),
        ("target backward", head, 2 * (16 + w3 + 10)),
        ("target backward", second, 2 * (b + w2 + a)),
        ("target backward", second, 2 * (b + a + w2)),
        ("target backward", first, 2 * (a + x + w1)),  # the images need no gradient
        ("optimiser", 0, 5 * 4 * (w1 + w2 + w3)),
    ]
    assert sorted((o.part, o.flops, o.bytes) for o in operations) == sorted(expected)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_and_transposed_convolutions(dims):
    ordinary, transposed = (getattr(nn, f"{name}{dims}d") for name in ("Conv", "ConvTranspose"))
    shape = (6,) * dims
    with torch.device("meta"):
        pair = [ordinary(4, 8, 2, stride=2, bias=False), transposed(8, 4, 2, stride=2, bias=False)]
    down, up = forward(nn.Sequential(*pair), (4, *shape), 3, part="both", itemsize=4)
    assert down.flops == up.flops == 2 * 3 * 8 * 3**dims * 4 * 2**dims
    assert down.bytes == up.bytes == 4 * (3 * 4 * 6**dims + 4 * 8 * 2**dims + 3 * 8 * 3**dims)


def test_the_floor_of_each_operation_is_its_larger_side():
    found = floor([Operation("", "", 100, 10), Operation("", "", 10, 100)], flops_per_s=10, bytes_per_s=20)
    assert (found.flops, found.bytes) == (110, 110)
    assert (found.by_flops_s, found.by_bytes_s, found.by_operation_s) == (11, 5.5, 10 + 5)


@pytest.mark.parametrize(
    "changes", [{}, {"module": False}, {"target": "resnet18", "size": 32}, {"target": "resnet3d18", "frames": 4}]
)
def test_arithmetic_is_what_describe_says(changes):
    asked = ASKED | changes
    small = recipe(asked)
    counted = {name: sum(o.flops for o in its) for name, its in rows(small, 7, torch.float32).items()}
    small.target.classes = 7
    for name, heads in {"scratch": [], "recalled": [1000]}.items():
        assert counted[name] == describe(small, heads)["flops_per_image"]["target_training"] * 8
    assert counted["live"] == counted["recalled"] + counted["sources alone"]


def test_transfer_modules_run_together_have_the_floor_of_plain_ones():
    two = ASKED | {"models": ["test_resnet", "test_resnet"]}
    plain, grouped = (rows(recipe(two, transfer__together=t), 7, torch.float32) for t in ("plain", "grouped"))
    assert plain == grouped


def test_half_the_bytes_in_half_the_precision():
    whole, half = (rows(recipe(ASKED), 7, dtype)["sources alone"] for dtype in (torch.float32, torch.bfloat16))
    assert [o.bytes for o in whole] == [2 * o.bytes for o in half]


def test_suite(capsys):
    content = run(["--size", "24", "--models", "test_resnet", "--source-size", "32", "--batch", "8", "--flops", "1e12",
                   "--bytes", "1e11"])  # fmt: skip
    found = {row["name"]: row for row in content["rows"]}
    assert list(found) == ["scratch", "recalled", "live", "sources alone"]
    for row in found.values():
        assert row["images_per_s"] == pytest.approx(8 / row["by_operation_s"])
        assert (
            max(row["by_flops_s"], row["by_bytes_s"]) <= row["by_operation_s"] <= row["by_flops_s"] + row["by_bytes_s"]
        )
    parts = {part["name"]: part for part in content["parts"]}
    assert list(parts) == ["target forward", "target backward", "optimiser", "source0"]
    assert found["live"]["flops"] == sum(part["flops"] for part in parts.values())
    assert content["rates"] == {"flops_per_s": 1e12, "bytes_per_s": 1e11, "of": "assumed"}
    assert "sources alone" in capsys.readouterr().out


def test_measured_rates(monkeypatch):
    from fasttrain.benchmarks import floors

    monkeypatch.setattr(floors, "copy_bandwidth", lambda device: 2e9)
    monkeypatch.setattr(floors, "product_rate", lambda device, dtype: {torch.float32: 3e9}[dtype])
    content = run(["--size", "24", "--models", "test_resnet", "--source-size", "32", "--measure", "--dtype", "fp32"])
    assert content["rates"]["flops_per_s"] == 3e9 and content["rates"]["bytes_per_s"] == 2e9
    assert content["rates"]["of"] != "assumed"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "or --measure"),
        (["--flops", "1e12"], "or --measure"),
        (["--flops", "1e12", "--bytes", "1e12", "--measure"], "not all of them"),
        (["--measure", "--classes", "0"], "--classes is 0"),
        (["--measure", "--images", "3"], "what is --images 3"),
        (["--measure", "--target", "resnet99"], "no backbone is called 'resnet99'"),
    ],
)
def test_mistakes(given, said):
    with pytest.raises(ValueError, match=said):
        run(given)
