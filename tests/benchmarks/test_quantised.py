"""8 bits, emulated: what is rounded, by which scales, in which layers."""

import pytest
import torch
from fasttrain.benchmarks.quantised import Setting, emulated, rounded, settings
from torch import nn


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6 * 16, 5)).eval()


@pytest.mark.parametrize(("kind", "relative", "absolute"), [("fp8", 2**-4, 2**-10 / 448), ("int8", 0, 0.5 / 127)])
def test_rounding_is_the_formats(kind, relative, absolute):
    """Half a unit in the last place: of 3 bits of mantissa (or of the smallest step), of 127 steps."""
    x = torch.randn(10_000) * torch.logspace(-3, 0, 10_000)
    largest = x.abs().max()
    error = (rounded(x, largest, kind) - x).abs()
    limit = torch.maximum(relative * x.abs(), absolute * largest)
    assert (error <= 1.001 * limit).all() and (error > 0.9 * limit).any()
    assert float(rounded(largest, largest, kind)) == pytest.approx(float(largest))
    assert float(rounded(2 * largest, largest, kind)) == pytest.approx(float(largest))  # saturates
    assert len(rounded(x, largest, kind).unique()) <= 255


def test_unsigned_inputs_have_twice_the_steps():
    x = torch.rand(10_000)
    error = [(rounded(x, x.max(), kind) - x).abs().max() for kind in ("int8", "int8u")]
    assert float(error[0] / error[1]) == pytest.approx(255 / 127, rel=0.02)


def test_only_the_layers_asked_for_are_changed():
    plain, x = network(), torch.randn(4, 3, 8, 8)
    changed = {}
    for pointwise in (False, True):
        for ends in (False, True):
            out = emulated(plain, Setting("int8", "image", pointwise, ends), x)
            pairs = zip(plain, out, strict=True)
            changed[pointwise, ends] = [
                i for i, (a, b) in enumerate(pairs) if hasattr(a, "weight") and not torch.equal(a.weight, b.weight)
            ]
    assert changed == {(False, True): [0, 2, 3, 5], (False, False): [2, 3], (True, True): [2, 5], (True, False): [2]}


def test_values_that_8_bits_hold_are_left_alone():
    layer = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False)).eval()
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[127.0, 3], [-127, 5], [64, 127]]).view(3, 2, 1, 1))
    x = torch.randint(-127, 128, (2, 2, 4, 4)).float()
    x[:, :, 0, 0] = 127
    for scales in ("static", "tensor", "image"):
        out = emulated(layer, Setting("int8", scales, False, True), x)
        torch.testing.assert_close(out(x), layer(x))


def test_static_scales_are_those_of_the_calibration_images():
    x, layer = torch.randn(4, 3, 8, 8), network()[:1]
    static = emulated(layer, Setting("int8", "static", False, True), x)
    tensor = emulated(layer, Setting("int8", "tensor", False, True), x)
    torch.testing.assert_close(static(x), tensor(x), rtol=0, atol=1e-6)
    assert (static(10 * x) - tensor(10 * x)).abs().max() > 0.1  # cut off at what calibration saw


def test_a_scale_for_each_image_does_not_see_the_others():
    x = torch.randn(4, 3, 8, 8) * torch.tensor([1.0, 10, 100, 1000]).view(4, 1, 1, 1)
    for scales, same in (("image", True), ("tensor", False)):
        out = emulated(network(), Setting("fp8", scales, False, True), x)
        assert torch.allclose(out(x)[:1], out(x[:1]), rtol=1e-5, atol=1e-6) == same


def test_names_differ():
    assert len({s.name for s in settings()}) == len(settings())
