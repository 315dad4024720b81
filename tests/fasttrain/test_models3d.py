"""Targets of clips: parameter counts, the networks written out, taps, shortcuts, and channels_last."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.build import build_target
from fasttrain.models import BACKBONES, Target, build_backbone
from fasttrain.recipe import Recipe, Transfer
from fasttrain.recipe import Target as TargetFields

TWO = {"imagenet": 1000, "places": 365}
# with 101 classes: alone, with linear heads of the sources in TWO, with transfer modules. The published code's 3D-ResNet-18 has
# 34.0 million with linear heads and 93.6 million with transfer modules: shortcut B.
COUNTS = {
    ("resnet3d18", "A"): (33_081_893, 33_782_138, 93_456_258),
    ("resnet3d18", "B"): (33_255_717, 33_955_962, 93_630_082),
    ("resnet3d34", "A"): (63_391_525, 64_091_770, 123_765_890),
    ("resnet3d34", "B"): (63_565_349, 64_265_594, 123_939_714),
    ("resnet3d50", "A"): (43_629_349, 46_426_234, 106_883_714),
    ("resnet3d50", "B"): (46_405_925, 49_202_810, 109_660_290),
}
# torchvision's documented counts with Kinetics' 400 classes
OF_TORCHVISION = {"r3d_18": 33_371_472, "mc3_18": 11_695_440, "r2plus1d_18": 31_505_325}
MODELS_3D = [*dict.fromkeys(model for model, _ in COUNTS), *OF_TORCHVISION]
narrow = pytest.mark.parametrize(
    ("model", "shortcut"), [("resnet3d18", "A"), ("resnet3d18", "B"), ("resnet3d50", "A"), ("resnet3d50", "B")]
)


def target_of(model: str, *, classes=10, sources=TWO, module=False, weights=True, **fields) -> Target:
    recipe = Recipe(target=TargetFields(model=model, **fields), transfer=Transfer(module=module))
    return build_target(recipe, classes, sources, weights=weights)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def by_formula(depth: int, shortcut: str, sources: list[int], module: bool, classes: int = 101) -> int:
    """Kernel volume times channels in and out, two numbers a channel of batch norm, from the papers' tables."""
    expansion, blocks = {18: (1, (2, 2, 2, 2)), 34: (1, (3, 4, 6, 3)), 50: (4, (3, 4, 6, 3))}[depth]
    total, channels, taps = 343 * 3 * 64 + 128, 64, []
    for planes, number in zip((64, 128, 256, 512), blocks, strict=True):
        out = planes * expansion
        if shortcut == "B" and (planes > 64 or channels != out):
            total += channels * out + 2 * out
        for i in range(number):
            into = channels if i == 0 else out
            if expansion == 1:
                total += 27 * into * out + 27 * out * out + 4 * out
            else:
                total += into * planes + 27 * planes * planes + planes * out + 4 * planes + 2 * out
        channels = out
        taps.append(out)
    total += (channels + 1) * classes
    for of_source in sources:
        if module:
            first, second, third = [(c + 1) * 500 + 1000 for c in taps], (27 * 500 + 1) * 500 + 1000, 501 * 1000 + 2000
            total += sum(first) + 4 * (second + third) + 1001 * of_source
        else:
            total += (channels + 1) * of_source
    return total


@pytest.mark.parametrize(("model", "shortcut"), COUNTS)
def test_parameter_counts(model, shortcut):
    depth = int(model.removeprefix("resnet3d"))
    with torch.device("meta"):
        found = tuple(
            count(target_of(model, shortcut=shortcut, classes=101, sources=sources, module=module))
            for sources, module in (({}, False), (TWO, False), (TWO, True))
        )
    assert found == COUNTS[model, shortcut]
    formula = [by_formula(depth, shortcut, s, m) for s, m in (([], False), ([1000, 365], False), ([1000, 365], True))]
    assert found == tuple(formula)


@pytest.mark.parametrize("model", OF_TORCHVISION)
def test_parameter_counts_of_torchvisions(model):
    with torch.device("meta"):
        assert count(target_of(model, classes=400, sources={})) == OF_TORCHVISION[model]


def test_the_published_counts_are_those_of_shortcut_b():
    _, linear, module = COUNTS["resnet3d18", "B"]
    assert (round(linear / 1e6, 1), round(module / 1e6, 1)) == (34.0, 93.6)
    _, linear, module = COUNTS["resnet3d18", "A"]
    assert (round(linear / 1e6, 1), round(module / 1e6, 1)) == (33.8, 93.5)


SHAPES = [(64, 4, 8, 8), (128, 2, 4, 4), (256, 1, 2, 2), (512, 1, 1, 1)]  # of 8 frames of 32 px


@pytest.mark.parametrize("model", MODELS_3D)
def test_taps(model):
    """Of 8 frames at 32 px; the last maps have become 1."""
    with torch.device("meta"):
        backbone = build_backbone(model)
        taps, last = backbone(torch.empty(2, 3, 8, 32, 32))
    shapes, torchvisions = SHAPES, [(64, 8, 16, 16), (128, 4, 8, 8), (256, 2, 4, 4), (512, 1, 2, 2)]
    if model in OF_TORCHVISION:
        shapes = torchvisions if model != "mc3_18" else [(c, 8, s, s) for c, _, s, _ in torchvisions]
    elif model == "resnet3d50":
        shapes = [(4 * c, *space) for c, *space in SHAPES]
    assert [tuple(t.shape[1:]) for t in taps] == shapes
    assert tuple(t.shape[1] for t in taps) == backbone.tap_channels
    assert last is taps[-1] and backbone.pool(last).shape == (2, backbone.feature_dim)
    assert (backbone.dims, backbone.transfer_width, backbone.name) == (3, 1000, model)


@pytest.mark.parametrize(("frames", "size", "last"), [(16, 112, (1, 4, 4)), (1, 32, (1, 1, 1)), (5, 17, (1, 1, 1))])
def test_any_length_and_size(frames, size, last):
    with torch.device("meta"):
        _, pooled = build_backbone("resnet3d18", width=0.125)(torch.empty(2, 3, frames, size, size))
    assert pooled.shape == (2, 64, *last)


@pytest.mark.parametrize(
    ("width", "channels", "transfer"),
    [(0.125, (8, 16, 32, 64), 124), (0.5, (32, 64, 128, 256), 500), (0.02, (1, 2, 4, 8), 20)],
)
def test_width(width, channels, transfer):
    """All channels by the same factor; a transfer module's width too, and it stays even."""
    with torch.device("meta"):
        backbone = build_backbone("resnet3d18", width=width)
        assert (backbone.tap_channels, backbone.feature_dim) == (channels, channels[-1])
        assert backbone.transfer_width == transfer and backbone.conv1.out_channels == channels[0]
        assert build_backbone("resnet3d50", width=width).tap_channels == tuple(4 * c for c in channels)


def functional(state: dict[str, Tensor], clip_BCTHW: Tensor, expansion: int, shortcut: str) -> list[Tensor]:
    """The network written out, in evaluation: shortcut A as the paper has it, by average pooling with a kernel of 1."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{k}"].view(1, -1, 1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = F.conv3d(clip_BCTHW, state["conv1.weight"], stride=(1, 2, 2), padding=3)
    x = F.max_pool3d(norm(x, "bn1").clamp(min=0), 3, 2, 1)
    taps = []
    for stage in range(1, 5):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            if expansion == 1:
                y = norm(F.conv3d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.bn1").clamp(min=0)
                y = norm(F.conv3d(y, state[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
            else:
                y = norm(F.conv3d(x, state[f"{at}.conv1.weight"]), f"{at}.bn1").clamp(min=0)
                y = norm(F.conv3d(y, state[f"{at}.conv2.weight"], stride=stride, padding=1), f"{at}.bn2").clamp(min=0)
                y = norm(F.conv3d(y, state[f"{at}.conv3.weight"]), f"{at}.bn3")
            if y.shape != x.shape and shortcut == "A":
                x = F.avg_pool3d(x, 1, stride)
                x = torch.cat([x, x.new_zeros(len(x), y.shape[1] - x.shape[1], *x.shape[2:])], dim=1)
            elif y.shape != x.shape:
                x = norm(F.conv3d(x, state[f"{at}.downsample.0.weight"], stride=stride), f"{at}.downsample.1")
            x, block = (x + y).clamp(min=0), block + 1
        taps.append(x)
    return taps


def shaken(network: nn.Module) -> nn.Module:
    """Batch norms not as they begin."""
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm3d)):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
    return network


@narrow
def test_the_network_written_out(model, shortcut):
    """In float64: taps, and gradients of the clip and of every parameter, through shortcuts of both types."""
    ours = shaken(build_backbone(model, shortcut=shortcut, width=0.125)).double().eval()
    state = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in ours.state_dict().items()}
    clip = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64)
    clips = [clip.clone().requires_grad_() for _ in (0, 1)]
    found, expected = ours(clips[0])[0], functional(state, clips[1], 4 if "50" in model else 1, shortcut)
    for taps in (found, expected):
        sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in taps).backward()
    for a, b in zip(found, expected, strict=True):
        assert b.std() > 1e-3 and torch.allclose(a, b, rtol=1e-10, atol=1e-10 * b.abs().max().item())
    pairs = {"clip": (clips[0].grad, clips[1].grad)}
    pairs |= {name: (p.grad, state[name].grad) for name, p in ours.named_parameters()}
    for name, (a, b) in pairs.items():
        assert b.abs().max() > 0 and torch.allclose(a, b, rtol=1e-9, atol=1e-10 * b.abs().max().item()), name


def test_shortcut_a_lets_the_gradient_through():
    """With its convolutions silent, a block that changes the shape passes on every second value, and the gradient to these."""
    block = build_backbone("resnet3d18", width=0.125).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)
    x = (torch.rand(2, 8, 4, 6, 6) + 0.1).requires_grad_()
    out = block(x)
    assert torch.equal(out[:, :8], x[:, :, ::2, ::2, ::2]) and not out[:, 8:].any()
    out.sum().backward()
    expected = torch.zeros_like(x)
    expected[:, :, ::2, ::2, ::2] = 1
    assert torch.equal(x.grad, expected)


def test_shortcut_b_is_torchvisions_network_with_another_stem():
    """Where strides are and what follows what, against a network that others wrote."""
    from torchvision.models.video.resnet import BasicBlock, Conv3DSimple, VideoResNet

    def stem() -> nn.Sequential:
        conv = nn.Conv3d(3, 64, 7, (1, 2, 2), 3, bias=False)
        return nn.Sequential(conv, nn.BatchNorm3d(64), nn.ReLU(), nn.MaxPool3d(3, 2, 1))

    with torch.device("meta"):
        theirs = VideoResNet(BasicBlock, [Conv3DSimple] * 4, [2, 2, 2, 2], stem, num_classes=1).eval()
    ours = shaken(build_backbone("resnet3d18", shortcut="B")).eval()
    names = {"stem.0.": "conv1.", "stem.1.": "bn1."}
    names |= {f"conv{i}.{part}.": f"{ours_}{i}." for i in (1, 2) for part, ours_ in enumerate(("conv", "bn"))}
    given, state = ours.state_dict(), {}
    for key in (k for k in theirs.state_dict() if not k.startswith("fc.")):
        name = key
        for old, new in names.items():
            name = name.replace(old, new)
        state[key] = given.pop(name)
    assert not given  # all of ours are in theirs
    theirs.load_state_dict(state | {"fc.weight": torch.zeros(1, 512), "fc.bias": torch.zeros(1)}, assign=True)
    outputs = []
    for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    clip = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        theirs(clip)
        taps, _ = ours(clip)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(taps, outputs, strict=True))
    assert taps[-1].std() > 0.01


@pytest.mark.parametrize("model", OF_TORCHVISION)
def test_torchvisions_state_dicts_fit(model):
    import torchvision

    with torch.device("meta"):
        theirs, ours = (
            torchvision.models.get_model(model, weights=None).state_dict(),
            build_backbone(model).state_dict(),
        )
    assert {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")} == {k: v.shape for k, v in ours.items()}
    assert list(ours) == [k for k in theirs if not k.startswith("fc.")]


def test_torchvisions_video_network_is_theirs():
    import torchvision

    theirs, ours = torchvision.models.video.mc3_18().eval(), build_backbone("mc3_18").eval()
    ours.load_state_dict({k: v for k, v in shaken(theirs).state_dict().items() if not k.startswith("fc.")})
    theirs.fc = nn.Identity()
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        feature = theirs(clip)
        assert feature.std() > 0.01 and torch.allclose(ours.pool(ours(clip)[1]), feature, rtol=1e-5, atol=1e-6)


def test_initialisation():
    """As in the published code: He et al.'s, by the fan out; the batch norms' 1 and 0."""
    backbone = build_backbone("resnet3d18", shortcut="B", width=0.5)
    convs = {n: m.weight for n, m in backbone.named_modules() if isinstance(m, nn.Conv3d)}
    for name, weight in convs.items():
        expected = (2 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm3d)]
    assert len(norms) == len(convs) and all((n.weight == 1).all() and (n.bias == 0).all() for n in norms)


@pytest.mark.parametrize("module", [False, True])
@narrow
def test_every_parameter_learns(model, shortcut, module):
    """The taps that the transfer modules read are not overwritten by the stages after them."""
    target = target_of(model, module=module, shortcut=shortcut, width=0.125, sources={"one": 7, "two": 5})
    out = target(torch.randn(3, 3, 8, 32, 32), aux=True)
    assert out.logits_BK.shape == (3, 10) and out.aux_logits_BC.shape == (3, 12)
    (out.logits_BK.sum() + out.aux_logits_BC.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in target.parameters())


def test_channels_last():
    """Of images and of clips: every convolution's weight, and what it puts out; the values stay."""
    for model, fields, format_, shape in (
        ("resnet3d18", {"width": 0.125, "shortcut": "B"}, torch.channels_last_3d, (2, 3, 4, 32, 32)),
        ("resnet20", {}, torch.channels_last, (2, 3, 16, 16)),
    ):
        target = target_of(model, module=True, sources={"one": 7}, **fields).eval()
        changed = copy.deepcopy(target).channels_last()
        assert isinstance(changed, Target)
        convs = [m for m in changed.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
        assert convs and all(c.weight.is_contiguous(memory_format=format_) for c in convs)
        pixels = torch.randn(shape)
        last = pixels.contiguous(memory_format=format_)
        assert changed.backbone(last)[0][0].is_contiguous(memory_format=format_)
        assert torch.allclose(changed(last, aux=True).aux_logits_BC, target(pixels, aux=True).aux_logits_BC, atol=1e-4)


def test_compiled_in_one_graph():
    torch.compiler.reset()
    target = target_of("resnet3d18", module=True, sources={"one": 7}, width=0.125).eval()
    clip = torch.randn(2, 3, 4, 32, 32)
    compiled = torch.compile(target, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(clip, aux=True).aux_logits_BC, target(clip, aux=True).aux_logits_BC, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("resnet18", {"shortcut": "B"}, r"target\.shortcut: B, but resnet18 has no choice of it; only resnet3d18"),
        ("r3d_18", {"width": 0.5}, r"target\.width: 0\.5, but r3d_18 has no choice of it; only resnet3d18"),
        ("resnet3d18", {"width": 0.001}, r"target\.width: 0\.001 leaves the stem 0 of its 64 channels"),
        ("resnet3d18", {"width": -1.0}, r"target\.width: -1 leaves"),
    ],
)
def test_mistakes(model, fields, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(model, **fields)


def test_every_backbone_of_clips_is_here():
    with torch.device("meta"):
        assert {name for name in BACKBONES if build_backbone(name).dims == 3} == set(MODELS_3D)
