"""Learning to solve puzzles: the network, what it cannot cheat by, runs that go on bit for bit, where puzzles have no place."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain.loaders import Puzzle
from PIL import Image

from fasttrain import inference
from fasttrain.build import build, loader_specs, open_data
from fasttrain.describe import describe, to_text
from fasttrain.export import export
from fasttrain.models import PuzzleTarget, build_backbone
from fasttrain.models.puzzle import standardised
from fasttrain.recipe import Source
from fasttrain.trained import open_trained
from fasttrain.trainer import evaluate

from .test_trainer import Stopped, curve, fit

JIGSAW = ("--pretext.task", "jigsaw", "--method.name", "scratch", "--pretext.width", "8", "--pretext.hidden", "16")


@pytest.fixture
def small(smoke):
    """Puzzles of the made-up stripes: a step of milliseconds, and nothing asked of what is learned."""
    less = ("--pretext.permutations", "20", "--data.labelled", "60", "--data.batch", "16", "--run.log_every", "1")
    return lambda *overrides: smoke(*JIGSAW, *less, *overrides)


def cells(root: Path, count: int = 96, side: int = 24) -> Path:
    """Images of 2 x 2 cells with stripes of their own direction in each, anywhere, in noise: a tile's cell can be told."""
    rng, half = np.random.default_rng(0), side // 2
    y, x = np.mgrid[:half, :half]
    for i in range(count):
        image_SS = rng.normal(127, 10, (side, side))
        for cell, angle in enumerate(np.pi * np.array([0, 0.5, 0.25, 0.75])):
            wave = 70 * np.sin(1.2 * (x * np.sin(angle) + y * np.cos(angle)) + rng.uniform(0, 2 * np.pi))
            row, column = divmod(cell, 2)
            image_SS[row * half : (row + 1) * half, column * half : (column + 1) * half] += wave
        folder = root / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image_HW3 = np.repeat(image_SS.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        Image.fromarray(image_HW3).save(folder / f"{i:03}.png")
    return root


def target_of(name: str = "resnet20", places: int = 4, classes: int = 5) -> PuzzleTarget:
    return PuzzleTarget(build_backbone(name), places=places, classes=classes, width=6, hidden=7)


@pytest.mark.parametrize(("name", "side"), [("resnet20", 7), ("resnet18", 12), ("mobilenet_v2", 20)])
def test_any_trunk_solves_puzzles(name, side):
    """Logits of each puzzle, a gradient everywhere, and no more parameters than layers have."""
    target = target_of(name, places=9).channels_last()
    pixels = torch.randn(3, 3, 9, side, side)
    out = target(pixels)
    assert out.logits_BK.shape == (3, 5) and out.aux_logits_BC is None
    out.logits_BK.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in target.parameters())
    feature = target.backbone.feature_dim
    layers = feature * 6 + 3 * 6 + 9 * 6 * 7 + 3 * 7 + 7 * 5 + 5  # each layer's biases, and two of batch norm
    assert sum(p.numel() for p in target.parameters()) == sum(p.numel() for p in target.backbone.parameters()) + layers


def test_every_tile_goes_through_one_trunk():
    """Tiles in another order: the same features in that order, whatever lies beside them."""
    target, seen = target_of().eval(), []
    target.join.register_forward_pre_hook(lambda module, given: seen.append(given[0].unflatten(1, (4, 6))))
    pixels, order = torch.randn(2, 3, 4, 9, 9), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        first, second = target(pixels).logits_BK, target(pixels[:, :, order]).logits_BK
        changed = pixels.clone()
        changed[:, :, 1] = 0.5
        target(changed)
    assert torch.allclose(seen[1], seen[0][:, order], atol=1e-5) and not torch.allclose(first, second)
    assert torch.allclose(seen[2][:, [0, 2, 3]], seen[0][:, [0, 2, 3]], atol=1e-5)
    assert not torch.allclose(seen[2][:, 1], seen[0][:, 1], atol=1e-3)


def test_tiles_have_mean_0_and_deviation_1():
    x_NCHW = torch.randn(5, 3, 11, 11) * torch.rand(5, 3, 1, 1) * 4 + torch.randn(5, 3, 1, 1)
    out = standardised(x_NCHW)
    expected = x_NCHW.double().numpy()
    expected = expected - expected.mean(axis=(2, 3), keepdims=True)
    expected /= expected.std(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_of_float32(dtype):
    """Of half-precision pixels far from 0, where a mean in half precision would be off; under autocast too."""
    x_NCHW = (torch.randn(4, 3, 40, 40) + 50).to(dtype)
    wanted = standardised(x_NCHW.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = standardised(x_NCHW)
    assert out.dtype == torch.float32 and torch.equal(out, wanted)
    assert out.mean(dim=(2, 3)).abs().max() < 1e-4


def test_flat_tiles_become_0_with_a_finite_gradient():
    x_NCHW = torch.full((2, 3, 8, 8), 0.3)
    x_NCHW[1] = torch.randn(3, 8, 8)
    out = standardised(x_NCHW.requires_grad_())
    (out**2 * torch.rand_like(out)).sum().backward()
    assert out[0].abs().max() < 1e-3 and x_NCHW.grad.isfinite().all()
    assert x_NCHW.grad[1].abs().max() > 0


def test_brightness_and_contrast_tell_nothing():
    """One texture in all cells, each lighter and stronger than the one before: of its cell nothing is left in a tile."""
    texture_HW3 = np.random.default_rng(0).integers(0, 40, (12, 12, 3))
    rows = [[texture_HW3 * (1 + c) + 9 * c for c in (0, 1)], [texture_HW3 * (1 + c) + 9 * c for c in (2, 3)]]
    image = torch.from_numpy(np.block([[[rows[0][0]], [rows[0][1]]], [[rows[1][0]], [rows[1][1]]]]))
    tile_NCHW = torch.stack([image[r : r + 12, c : c + 12] for r in (0, 12) for c in (0, 12)]).permute(0, 3, 1, 2)
    assert len({float(mean) for mean in tile_NCHW.float().mean(dim=(1, 2, 3))}) == 4
    out = standardised((tile_NCHW - 120) / 60)
    assert torch.allclose(out, out[:1].expand_as(out), atol=1e-4)


def test_structure_is_learned(smoke, tmp_path):
    """Four orders of 2 x 2 tiles, of which one may be another image's: far above the quarter that guessing finds; figures are
    those that ``fasttrain eval`` gives."""
    data = ("--data.name", "folder", "--data.root", str(cells(tmp_path / "cells")), "--data.pad", "0")
    data += ("--data.flip", "none", "--data.views", "0", "--data.batch", "16", "--run.precision", "fp32")
    how = ("--pretext.grid", "2", "--pretext.permutations", "4", "--pretext.replaced", "1", "--pretext.hidden", "32")
    run = ("--optim.epochs", "16", "--optim.lr", "0.1", "--run.eval_every", "4", "--pretext.width", "16")
    folder = fit(smoke(*JIGSAW, *data, *how, *run))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metric"] == "accuracy" and summary["test"]["accuracy"] > 70
    for split in ("test", "val"):
        assert inference.evaluate_run(str(folder), split, [])["figures"] == summary[split]


@pytest.mark.parametrize(
    "how", [("--data.views", "2"), ("--data.views", "0", "--data.loader", "torch", "--data.workers", "0")]
)
def test_stopped_and_resumed_is_bit_identical(small, how):
    common = (*how, "--run.checkpoint_steps", "2", "--optim.epochs", "2")
    whole = fit(small(*common, "--name", "whole"))
    stopped = small(*common, "--name", "stopped")
    for stop_at in (3, 4):  # inside an epoch, each time
        with pytest.raises(Stopped):
            fit(stopped, stop_at)
    folder = fit(stopped)
    assert curve(folder) == curve(whole) and len(curve(whole)) == 10
    first, second = (torch.load(f / "checkpoints/selected.pt", weights_only=True)["target"] for f in (whole, folder))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_an_ordinary_target_starts_from_the_trunk(small, smoke):
    folder = fit(small("--optim.epochs", "1"))
    path = folder / "checkpoints" / "selected.pt"
    parts = build(smoke("--method.name", "scratch", "--target.weights", str(path)))
    learned = torch.load(path, weights_only=True)["target"]
    for name, value in parts.target.backbone.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, learned[f"backbone.{name}"]), name
    assert parts.target.classes == 3 and "tile.0.weight" in learned
    assert any(line.startswith("target: resnet20 from ") for line in parts.log)


def test_gradients_are_accumulated_over_parts(small):
    """Of 16 puzzles 8 and 8: another curve, for batch norm sees the parts; no part is of one puzzle."""
    common = ("--optim.epochs", "1", "--run.precision", "fp32")
    parts = curve(fit(small(*common, "--run.accumulate", "2", "--name", "parts")))
    whole = curve(fit(small(*common, "--name", "whole")))
    assert len(parts) == len(whole) == 5 and parts != whole and all(np.isfinite(loss) for _, loss, *_ in parts)
    with pytest.raises(ValueError, match=r"^run\.accumulate: 17 parts of a batch of 17 leave one with fewer than 2"):
        build(small("--data.batch", "17", "--run.accumulate", "17"))
    for batch in ("15", "19"):  # 60 = 15 * 4, and 19 * 3 + 3
        loader = build(small("--data.batch", batch, "--run.accumulate", "2")).loaders["train"]
        assert all(min(served.parts) > 1 for served in loader)


def test_images_that_grow_make_tiles_that_grow(small):
    recipe = small("--data.grow_from", "18", "--data.grow_epochs", "[1, 2]", "--optim.epochs", "3")
    loader = build(recipe).loaders["train"]
    sides = []
    for _ in range(3):
        sides.append({batch.pixels.shape[-1] for batch in loader})
    assert sides == [{4}, {4}, {6}]
    assert all(np.isfinite(loss) for _, loss, *_ in curve(fit(recipe)))


def test_half_precision_trains(small):
    folder = fit(small("--run.precision", "bf16", "--optim.epochs", "1"))
    assert all(np.isfinite(loss) for _, loss, *_ in curve(folder))


def test_held_out_labels_are_those_of_their_puzzles(small):
    parts = build(small("--data.seed", "7"))
    for split in ("val", "test"):
        loader = parts.loaders[split]
        labels = [torch.cat([batch.targets for batch in loader]) for _ in range(2)]
        assert torch.equal(*labels)
        assert labels[0].tolist() == parts.dataset.targets_N[loader.spec.index_N].tolist()
    assert parts.dataset.classes == Puzzle(permutations=20).names
    first, second = (evaluate(parts, parts.target.eval(), "val") for _ in range(2))
    assert first == second


def test_black_rims_do_not_go_unsaid(small):
    """Moved within a black rim, an image tells by it which tiles are from its border, even one of noise."""
    for how, said in (((), True), (("--data.pad", "0"), False), (("--data.crop", "random_resized"), False)):
        assert any(line.startswith("puzzles: data.pad 2 leaves black rims") for line in build(small(*how)).log) == said


def test_a_part_of_the_images_is_one_whatever_the_labels(small):
    def chosen(count: str, seed: str = "0") -> list[int]:
        recipe = small("--data.labelled", count, "--data.seed", seed, "--data.batch", "8")
        dataset = open_data(recipe)
        other = replace(dataset, targets_N=dataset.targets_N[::-1].copy())
        index_N = loader_specs(recipe, dataset)[0].index_N
        assert (loader_specs(recipe, other)[0].index_N == index_N).all() and len(index_N) == int(count)
        return index_N.tolist()

    assert chosen("40") == chosen("40", seed="5")
    assert set(chosen("20")) < set(chosen("40")) < set(chosen("60"))


def test_puzzles_are_described(fasttrain):
    how = ("describe", "smoke", *JIGSAW, "--pretext.permutations", "20")
    content = json.loads(fasttrain(*how, "--json").stdout)
    assert content["input"] == [3, 9, 6, 6]
    parts_of_layers = 64 * 8 + 3 * 8 + 9 * 8 * 16 + 3 * 16 + 16 * 20 + 20
    trunk = sum(p.numel() for p in build_backbone("resnet20").parameters())
    assert content["parameters"] == {"target": trunk + parts_of_layers, "training": trunk + parts_of_layers}
    assert " GFLOP a puzzle" in fasttrain(*how).stdout


def test_flops_of_a_puzzle_are_those_of_its_tiles(small):
    one, puzzle = small("--data.size", "24"), small("--data.size", "78", "--pretext.tile", "24")
    one.pretext.task = "none"
    ratio = describe(puzzle)["flops_per_image"]["target_training"] / describe(one)["flops_per_image"]["target_training"]
    assert ratio == pytest.approx(9, rel=0.01)
    assert "a puzzle" not in to_text(describe(one))


def test_a_run_on_puzzles_is_no_classifier(small, tmp_path):
    folder = fit(small("--optim.epochs", "1"))
    with pytest.raises(ValueError, match=r"solves puzzles, .* \(target\.weights: .*selected\.pt\)"):
        export(str(folder), str(tmp_path / "out.safetensors"))
    assert not (tmp_path / "out.safetensors").exists()
    source = Source("solver", model="fasttrain", weights=str(folder), classes=20, size=24)
    with pytest.raises(ValueError, match=r"^sources: solver: the run in .* solves puzzles"):
        open_trained(source)


WRONG = {
    r"^pretext\.replaced: 10 of 9 tiles$": ("--pretext.replaced", "10"),
    r"^pretext\.replaced: 5 of 4 tiles$": ("--pretext.replaced", "5", "--pretext.grid", "2"),
    r"^method\.name: sskt does not go with pretext\.task: jigsaw, which needs scratch$": ("--method.name", "sskt"),
    r"^data\.frames: 4 does not go with": ("--data.frames", "4"),
    r"^data\.labels: row:a does not go with": ("--data.labels", "row:a"),
    r"^data\.balance: True does not go with": ("--data.balance", "true"),
    r"^pretext\.permutations: 1 is not above 1$": ("--pretext.permutations", "1"),
    r"^pretext\.permutations: 1513 is not between": ("--pretext.permutations", "1513"),
    r"^pretext\.permutations: 25 is not between": ("--pretext.permutations", "25", "--pretext.grid", "2"),
    r"pretext\.grid": ("--pretext.grid", "4"),
    r"^pretext\.grey: 1\.1 is not in \[0, 1\]$": ("--pretext.grey", "1.1"),
    r"^pretext\.tile: -1 is below 0$": ("--pretext.tile", "-1"),
    r"^pretext\.channel_shift: -1 is below 0$": ("--pretext.channel_shift", "-1"),
    r"^pretext\.replaced: -1 is below 0$": ("--pretext.replaced", "-1"),
    r"^pretext\.width: 0 is not above 0$": ("--pretext.width", "0"),
    r"^pretext\.hidden: 0 is not above 0$": ("--pretext.hidden", "0"),
    r"^pretext\.tile: tiles of 7 pixels, .* \(data\.size 24 / 3\)$": ("--pretext.tile", "7"),
    r"^pretext\.tile: tiles of .* \(data\.size 12 / 3\)$": (
        *("--pretext.tile", "4", "--data.grow_from", "12", "--data.grow_epochs", "[0, 2]"),
    ),
    r"^pretext\.tile, data\.size: 6 pixels leave nothing of vgg16_bn": ("--target.model", "vgg16_bn"),
    r"^target\.model: resnet3d18 takes clips; tiles of a puzzle are images": ("--target.model", "resnet3d18"),
    r"^target\.classes: 19, but toy has 20 classes$": ("--target.classes", "19"),
}


@pytest.mark.parametrize(("message", "how"), WRONG.items())
def test_what_does_not_go_with_puzzles_is_refused(small, message, how):
    with pytest.raises(ValueError, match=message) as error:
        build(small(*how))
    assert "\n" not in str(error.value)
