"""Targets: parameter counts as published, taps, heads, and the transfer module written out plainly."""

import pytest
import torch
import torch.nn.functional as F

from fasttrain.build import build_target
from fasttrain.models import BACKBONES, build_backbone
from fasttrain.recipe import Recipe, Target, Transfer
from fasttrain.transfer import LinearHead, TransferModule

from .test_models3d import MODELS_3D
from .test_more_models import OF_TORCHVISION

TWO = {"imagenet": 1000, "places": 365}
# the published code's counts (10 classes): alone, linear heads, transfer modules
COUNTS = {
    "resnet20": (269_722, 358_447, 435_503),
    "resnet32": (464_154, 552_879, 629_935),
    "resnet44": (658_586, 747_311, 824_367),
}
# likewise in millions (20 classes)
MILLIONS = {
    "resnet18": (11.19, 11.89, 35.56),
    "resnet34": (21.29, 22.00, 45.67),
    "resnet50": (23.55, 26.35, 50.80),
}


def target_of(model: str = "resnet20", module: bool = False, sources=TWO, combine: str = "sum", classes: int = 10):
    recipe = Recipe(target=Target(model=model), transfer=Transfer(module=module, combine=combine))
    return build_target(recipe, classes, sources)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("model", COUNTS)
def test_parameter_counts(model):
    alone, linear, module = COUNTS[model]
    assert count(target_of(model, sources={})) == alone
    assert count(target_of(model)) == linear
    assert count(target_of(model, module=True)) == module


@pytest.mark.parametrize("model", MILLIONS)
def test_parameter_counts_in_millions(model):
    alone, linear, module = MILLIONS[model]
    assert round(count(target_of(model, sources={}, classes=20)) / 1e6, 2) == alone
    assert round(count(target_of(model, classes=20)) / 1e6, 2) == linear
    assert round(count(target_of(model, module=True, classes=20)) / 1e6, 2) == module


def test_every_backbone_has_its_count():
    assert {*COUNTS, *MILLIONS, *OF_TORCHVISION, *MODELS_3D} == set(BACKBONES)


@pytest.mark.parametrize(
    ("model", "size", "shapes"),
    [
        *((model, 32, [(16, 32, 32), (32, 16, 16), (64, 8, 8)]) for model in COUNTS),
        *((model, 64, [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]) for model in ("resnet18", "resnet34")),
        ("resnet50", 64, [(256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]),
    ],
)
def test_taps(model, size, shapes):
    backbone = build_backbone(model).eval()
    taps, last = backbone(torch.randn(2, 3, size, size))
    assert [tuple(t.shape[1:]) for t in taps] == shapes
    assert tuple(t.shape[1] for t in taps) == backbone.tap_channels
    assert last is taps[-1] and backbone.pool(last).shape == (2, backbone.feature_dim)
    assert all((t >= 0).all() for t in taps)  # after the ReLU


def test_torchvisions_weights_fit():
    """A state dict of torchvision's, but for the classifier, gives torchvision's stages and pooled feature."""
    import torchvision

    theirs, ours = torchvision.models.resnet18().eval(), build_backbone("resnet18").eval()
    for norm in (m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    keys = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert keys.missing_keys == [] and keys.unexpected_keys == ["fc.weight", "fc.bias"]
    outputs = {}
    for name in ("layer1", "layer2", "layer3", "layer4", "avgpool"):
        getattr(theirs, name).register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs(pixels)
        taps, last = ours(pixels)
    feature = outputs.pop("avgpool").flatten(1)
    assert all(torch.equal(a, b) for a, b in zip(taps, outputs.values(), strict=True))
    assert feature.std() > 0.01 and torch.allclose(ours.pool(last), feature, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [False, True])
def test_a_large_backbone_trains_all_its_parameters(module):
    """The taps that the transfer module reads are not overwritten by the stages after them."""
    target = target_of("resnet18", module=module, sources={"one": 7})
    out = target(torch.randn(2, 3, 64, 64), aux=True)
    (out.logits_BK.sum() + out.aux_logits_BC.square().sum()).backward()
    assert all(p.grad is not None for p in target.parameters())


@pytest.mark.parametrize("module", [False, True])
def test_auxiliary_heads_run_only_when_asked(module):
    target = target_of(module=module)
    pixels = torch.randn(4, 3, 24, 24)
    assert target(pixels).aux_logits_BC is None
    out = target(pixels, aux=True)
    assert out.logits_BK.shape == (4, 10)
    assert out.aux_logits_BC.shape == (4, 1365)
    assert target_of(sources={})(pixels, aux=True).aux_logits_BC is None


def test_heads_are_side_by_side_in_the_sources_order():
    target = target_of().eval()
    pixels = torch.randn(2, 3, 24, 24)
    taps, last = target.backbone(pixels)
    feature = target.backbone.pool(last)
    out = target(pixels, aux=True).aux_logits_BC
    assert torch.equal(out[:, :1000], target.aux_heads["imagenet"](taps, feature))
    assert torch.equal(out[:, 1000:], target.aux_heads["places"](taps, feature))


def test_option_a_shortcut():
    """With the residual branch zeroed, a stage's first block takes every second pixel and pads channels with zeros."""
    backbone = build_backbone("resnet20").eval()
    block = backbone.stages[1][0]
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    out = block(x.clone())
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_transfer_module_is_what_the_figure_shows(combine):
    """Fig. 3 with every operation written out."""
    module = TransferModule((16, 32, 64), 64, 100, combine).eval()
    taps = [torch.randn(2, c, s, s) for c, s in ((16, 16), (32, 8), (64, 4))]
    total = 0
    for branch, x in zip(module.branches, taps, strict=True):
        convs = [m for m in branch if isinstance(m, torch.nn.Conv2d)]
        norms = [m for m in branch if isinstance(m, torch.nn.BatchNorm2d)]
        assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == [
            (x.shape[1], 32, 1, 1),
            (32, 32, 3, 2),
            (32, 64, 1, 1),
        ]
        for conv, norm in zip(convs, norms, strict=True):
            x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
            x = (x - norm.running_mean.view(1, -1, 1, 1)) / (norm.running_var.view(1, -1, 1, 1) + norm.eps).sqrt()
            x = F.relu(x * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1))
        total = total + F.adaptive_avg_pool2d(x, 1).flatten(1)
    if combine == "mean":
        total = total / 3
    assert torch.allclose(module(taps, torch.empty(0)), module.linear(total), atol=1e-5)


def test_linear_head_is_one_layer_on_the_feature():
    head = LinearHead(64, 7)
    feature = torch.randn(3, 64)
    assert torch.equal(head([], feature), F.linear(feature, head.linear.weight, head.linear.bias))


def test_unknown_backbone():
    with pytest.raises(ValueError, match="no backbone is called 'resnet99'; there are resnet20"):
        build_backbone("resnet99")
