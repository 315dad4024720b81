"""The baselines of the suite ``step``: they train, they differ where they say so, and they leave nothing behind."""

import copy
import math
import multiprocessing
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fasttrain.benchmarks.baselines import MEAN, STD, PaperStyle, TimmStyle
from torch import nn

from fasttrain.models.target import TargetOutput

SIDE, SOURCE_SIDE, BATCH, CLASSES = 8, 12, 6, 3
COUNTS = [5, 4]  # the sources' classes
CPU = torch.device("cpu")

# the published code's 4 workers, on a machine of fewer cores
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning")


class Tiny(nn.Module):
    """A target of one convolution, its heads side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head, self.aux = nn.Linear(8, CLASSES), nn.Linear(8, sum(COUNTS))

    def forward(self, x, aux=False):
        feature = self.trunk(x).mean((2, 3))
        return TargetOutput(self.head(feature), self.aux(feature) if aux else None)


class TinySource(nn.Module):
    """Notes the sizes of its inputs."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, classes)
        self.seen: list[torch.Size] = []

    def forward(self, x):
        self.seen.append(x.shape)
        return self.head(self.trunk(x).mean((2, 3)))


def toy(count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Images whose class is the channel that is bright."""
    labels_N = np.arange(count) % CLASSES
    images_NHWC = np.random.default_rng(0).integers(0, 120, (count, SIDE, SIDE, 3), dtype=np.uint8)
    images_NHWC[np.arange(count), :, :, labels_N] += 120
    return images_NHWC, labels_N


@pytest.fixture
def start(monkeypatch):
    """Opens a baseline with the networks given or tiny ones, and closes it."""
    opened = []
    monkeypatch.setattr(TimmStyle, "READ_EVERY", 1)

    def make(style, data=None, target=None, sources=None, **options):
        images_NHWC, labels_N = data or toy()
        # in the mode that is wrong for them
        sources = [TinySource(c).train(style is TimmStyle) for c in COUNTS] if sources is None else sources
        options = {"source_size": SOURCE_SIDE, "batch": BATCH, "device": CPU, "dtype": torch.float32} | options
        if style is TimmStyle:
            options = {"compile": False} | options
        opened.append(style(images_NHWC, labels_N, target or Tiny().eval(), sources, **options))
        return opened[-1]

    yield make
    for baseline in opened:
        baseline.close()


def batch_norms(baseline) -> list[torch.Tensor]:
    return [buffer.clone() for source in baseline.sources for buffer in source.buffers()]


@pytest.mark.parametrize("style", [PaperStyle, TimmStyle])
def test_it_learns(style, start):
    baseline = start(style, toy(4 * BATCH))
    before = [p.clone() for source in baseline.sources for p in source.parameters()]
    baseline.steps(60)
    assert len(baseline.losses) == 60
    assert np.mean(baseline.losses[-10:]) < np.mean(baseline.losses[:5]) - 0.7
    assert all(
        torch.equal(a, b) for a, b in zip(before, (p for s in baseline.sources for p in s.parameters()), strict=True)
    )
    if style is PaperStyle:
        assert len(baseline.accuracies) == 60 and np.mean(baseline.accuracies[-10:]) > 0.95


def test_the_papers_sources_drift_and_timms_do_not(start):
    for style, drifts in ((PaperStyle, True), (TimmStyle, False)):
        baseline = start(style)
        before = batch_norms(baseline)
        baseline.steps(2)
        same = [torch.equal(a, b) for a, b in zip(before, batch_norms(baseline), strict=True)]
        assert same == [not drifts] * len(before)
        assert all(s.training is drifts for s in baseline.sources)


@pytest.mark.parametrize(("style", "temperature"), [*product([PaperStyle, TimmStyle], [1.0, 3.0])])
def test_a_step_by_hand(style, temperature, start):
    """Loss and the target's new weights in float64, with every sum of the formulas written out."""
    baseline = start(style, temperature=temperature, lr=0.05)
    with torch.no_grad():
        for source in baseline.sources:
            source.head.weight.mul_(20)  # soft labels that differ
            source.trunk[1].running_mean.normal_()
    target, sources = copy.deepcopy(baseline.target).double(), copy.deepcopy(baseline.sources)
    x, y = torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH) % CLASSES
    loss = baseline.step(x, y)

    out = target(x.double(), aux=True)
    expected = -F.log_softmax(out.logits_BK, 1)[range(BATCH), y].mean()
    first = 0
    for source, count in zip(sources, COUNTS, strict=True):
        assert source.training is (style is PaperStyle)
        soft = source.double()(F.interpolate(x.double(), (SOURCE_SIDE, SOURCE_SIDE), mode="bilinear")).detach()
        t = (soft / temperature).exp() / (soft / temperature).exp().sum(1, keepdim=True)
        s = (out.aux_logits_BC[:, first : first + count] / temperature).exp()
        s, first = s / s.sum(1, keepdim=True), first + count
        terms = -t * s.log() if style is PaperStyle else t * (t.log() - s.log())
        expected = expected + temperature**2 * terms.sum() / BATCH
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for new, old in zip(baseline.target.parameters(), target.parameters(), strict=True):
        step = 0.05 * (old.grad + 5e-4 * old)  # the first: momentum has nothing yet
        assert torch.allclose(new.double(), old - step, atol=1e-6)


@pytest.mark.parametrize("style", [PaperStyle, TimmStyle])
def test_batches_are_shifted_mirrored_windows(style, start):
    images_NHWC, _ = data = toy(2)
    baseline = start(style, data, batch=2)
    padded = np.pad(images_NHWC, [(0, 0), (4, 4), (4, 4), (0, 0)]) / 255
    views = {
        (label, top, left, mirrored): ((window[:, ::-1] if mirrored else window) - MEAN) / STD
        for label, top, left, mirrored in product(range(2), range(9), range(9), (False, True))
        for window in [padded[label, top : top + SIDE, left : left + SIDE]]
    }
    seen = []
    for _ in range(6):
        pixel_BCHW, label_B = baseline.next_batch()
        assert pixel_BCHW.dtype == torch.float32 and label_B.dtype == torch.int64
        assert pixel_BCHW.is_contiguous(memory_format=baseline.LAYOUT)
        assert sorted(label_B.tolist()) == [0, 1]
        for pixels, label in zip(pixel_BCHW.permute(0, 2, 3, 1).numpy(), label_B.tolist(), strict=True):
            found = [view for view, expected in views.items() if np.allclose(pixels, expected, atol=1e-5)]
            assert found and all(view[0] == label for view in found)
            seen.append(found[0][1:])
    assert len(set(seen)) > 6 and {mirrored for *_, mirrored in seen} == {False, True}


def test_epochs(start):
    """20 images in batches of 6: the paper's epochs end with one of 2, timm's leave these out."""
    paper, timm = start(PaperStyle), start(TimmStyle)
    assert [paper.steps(1) for _ in range(8)] == [6, 6, 6, 2] * 2
    assert timm.steps(7) == 42


def test_the_papers_workers_are_new_in_each_epoch_and_timms_stay(start):
    for style, stay in ((PaperStyle, False), (TimmStyle, True)):
        baseline = start(style, toy(2 * BATCH))
        processes = []
        for _ in range(3):
            baseline.steps(2)
            processes.append({w.pid for w in baseline.epoch._workers})
        assert (processes[0] == processes[2]) is stay
        baseline.close()


@pytest.mark.parametrize("style", [PaperStyle, TimmStyle])
@pytest.mark.parametrize("steps", [0, 1, 4, 5])
def test_close_leaves_no_processes(style, steps, start):
    baseline = start(style)
    before = set(multiprocessing.active_children())
    baseline.steps(steps)
    if steps not in (0, 4):  # with the 4th step the paper's epoch ends, and its workers may
        assert set(multiprocessing.active_children()) > before
    baseline.close()
    assert set(multiprocessing.active_children()) == before
    baseline.close()
    assert baseline.steps(2) == 12  # and it can go on
    baseline.close()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("style", [PaperStyle, TimmStyle])
@pytest.mark.parametrize(
    ("source_size", "seen"), [(SOURCE_SIDE, SOURCE_SIDE), (SIDE, SIDE), (SIDE - 2, SIDE), (49, 49)]
)
def test_sources_see_enlarged_images(style, source_size, seen, start):
    baseline = start(style, source_size=source_size)
    baseline.step(torch.randn(2, 3, SIDE, SIDE), torch.tensor([0, 1]))
    assert [s.seen for s in baseline.sources] == [[torch.Size([2, 3, seen, seen])]] * 2


def test_losses_are_read_at_intervals(start, monkeypatch):
    monkeypatch.undo()
    assert (PaperStyle.READ_EVERY, TimmStyle.READ_EVERY) == (1, 50)
    monkeypatch.setattr(TimmStyle, "READ_EVERY", 4)
    baseline = start(TimmStyle)
    baseline.steps(3)
    assert baseline.losses == []
    baseline.steps(6)
    assert len(baseline.losses) == 2


def test_layouts_and_settings(start, monkeypatch):
    during = {}
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for style in (PaperStyle, TimmStyle):
        baseline = start(style, target=Tiny().to(memory_format=torch.channels_last))
        assert baseline.target.training
        for network in (baseline.target, *baseline.sources):
            assert network.trunk[0].weight.is_contiguous(memory_format=style.LAYOUT)
        step = baseline.step

        def noted(*batch, style=style, step=step):
            during[style] = torch.backends.cudnn.benchmark
            return step(*batch)

        monkeypatch.setattr(baseline, "step", noted)
        baseline.steps(1)
        assert torch.backends.cudnn.benchmark is False
    assert during == {PaperStyle: False, TimmStyle: True}


def test_timms_networks_are_compiled(start, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    target, sources = Tiny(), [TinySource(c) for c in COUNTS]
    start(PaperStyle)
    start(TimmStyle, compile=False)
    assert compiled == []
    start(TimmStyle, target=target, sources=sources, compile=True)
    assert compiled == [target, *sources]


@pytest.mark.slow
def test_compiled_it_takes_the_same_steps(start):
    networks = [Tiny(), *(TinySource(c) for c in COUNTS)]
    x, y = torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH) % CLASSES
    losses = []
    for compile in (False, True):
        target, *sources = copy.deepcopy(networks)
        for source in sources:
            source.forward = lambda x, s=source: s.head(s.trunk(x).mean((2, 3)))  # notes nothing
        baseline = start(TimmStyle, target=target, sources=sources, compile=compile)
        losses.append([baseline.step(x, y).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] > losses[0][2]


def test_autocast(start):
    types = []
    for dtype in (torch.float32, torch.bfloat16):
        baseline = start(TimmStyle, dtype=dtype)
        for network in (baseline.target, *baseline.sources):
            network.head.register_forward_hook(lambda _m, _i, out: types.append(out.dtype))
        loss = baseline.step(torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH) % CLASSES)
        assert loss.dtype == torch.float32 and math.isfinite(loss)
    assert types == [torch.float32] * 3 + [torch.bfloat16] * 3
    paper = start(PaperStyle, dtype=torch.bfloat16)
    paper.target.head.register_forward_hook(lambda _m, _i, out: types.append(out.dtype))
    paper.steps(1)
    assert types[-1] == torch.float32


@pytest.mark.parametrize("style", [PaperStyle, TimmStyle])
def test_mistakes(style, start):
    images_NHWC, labels_N = toy()
    for said, options in {
        "images: float64 \\[20, 8, 8, 3\\], not uint8": {"data": (images_NHWC / 255, labels_N)},
        "images: uint8 \\[20, 7, 8, 3\\], not uint8": {"data": (images_NHWC[:, 1:], labels_N)},
        "labels: \\[19\\] for 20 images": {"data": (images_NHWC, labels_N[1:])},
        "batch: 21 is not between 1 and the 20 images": {"batch": 21},
        "batch: 0": {"batch": 0},
        "sources: there has to be one": {"sources": []},
    }.items():
        with pytest.raises(ValueError, match=said):
            start(style, **options)
