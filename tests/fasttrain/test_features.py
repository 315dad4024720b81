"""Features of a trained backbone's stages: those of a plain forward pass, and of an image alone."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fasttrain.kernels import network_input
from fasttrain.loaders import LoaderSpec, evaluation, open_dataset, open_loader

from fasttrain import checkpoint
from fasttrain.build import build_target, ground
from fasttrain.models.puzzle import standardised
from fasttrain.pretext.features import StageFeatures, collect, open_trunk
from fasttrain.recipe import Recipe, load

PUZZLE = ("--pretext.task", "jigsaw", "--pretext.permutations", "20", "--pretext.width", "8", "--pretext.hidden", "16")

TEST_N = np.arange(160, 240)


def saved(path: Path, *overrides: str) -> Path:
    """A checkpoint of the smoke recipe's target as a run leaves one, its weights and batch norms random."""
    recipe = load("smoke", ["--method.name", "scratch", *overrides])
    dataset, task, _ = ground(recipe)
    torch.manual_seed(7)
    target = build_target(recipe, task.head_size, {}).train()
    if target.backbone.dims == 2:  # statistics that are not those of a new network
        with torch.no_grad():
            target.backbone(torch.randn(8, 3, 32, 32) * 2 + 0.5)
    content = {"target": target.state_dict(), "classes": list(dataset.classes), "recipe": asdict(recipe), "epoch": 1}
    checkpoint.save(path, content)
    return path


def features(
    trunk, recipe: Recipe, *, index_N: np.ndarray = TEST_N, batch: int = 250, rank: int = 0, ranks: int = 1, **options
) -> dict[int, list[torch.Tensor]]:
    """By the image's index in the toy data set."""
    spec = LoaderSpec(
        open_dataset("toy", val_share=0.2),
        index_N,
        evaluation(1.0),
        recipe.data.size,
        recipe.data.stored,
        batch,
        shuffle=False,
        rank=rank,
        ranks=ranks,
    )
    network = StageFeatures(trunk, [1, 2, 3, 0], **options)
    out = {}
    for index_F, layers in collect(network, open_loader("resident", spec), recipe, torch.device("cpu"), torch.float32):
        out |= {int(i): [feature_FD[row] for feature_FD in layers] for row, i in enumerate(index_F)}
    return out


def same(one: dict[int, list[torch.Tensor]], other: dict[int, list[torch.Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for index in one for a, b in zip(one[index], other[index], strict=True)
    )


def test_features_of_an_image_do_not_depend_on_batch_or_rank(tmp_path):
    trunk = open_trunk(str(saved(tmp_path / "net.pt")), "probe")
    wanted = features(trunk, trunk.recipe, pool=4, average=True)
    assert len(wanted) == 80
    assert same(wanted, features(trunk, trunk.recipe, batch=7, pool=4, average=True))
    assert same(wanted, features(trunk, trunk.recipe, batch=33, pool=4, average=True))
    parts = [features(trunk, trunk.recipe, batch=30, rank=r, ranks=3, pool=4, average=True) for r in range(3)]
    assert [len(part) for part in parts] == [27, 27, 26]
    assert same(wanted, parts[0] | parts[1] | parts[2])


@pytest.mark.parametrize("puzzle", [False, True])
def test_features_are_those_of_a_plain_forward_pass(tmp_path, puzzle):
    """Whole images are standardised one by one where the run has seen its tiles so."""
    path = saved(tmp_path / "net.pt", "--data.size", "36", *(PUZZLE if puzzle else ()))
    trunk = open_trunk(str(path), "probe")
    data = trunk.recipe.data
    dataset = open_dataset("toy", val_share=0.2)
    spec = LoaderSpec(dataset, dataset.splits["test"], evaluation(1.0), 36, data.stored, 80, shuffle=False)
    (batch,) = open_loader("resident", spec)
    x = network_input(batch.pixels, torch.tensor(data.mean), torch.tensor(data.std))
    with torch.no_grad():
        taps, last = trunk.backbone(standardised(x) if puzzle else x)
    wanted = [
        F.avg_pool2d(taps[0], 6).flatten(1),  # 36 px to a side of 6
        F.avg_pool2d(taps[1], 6).flatten(1),  # 18 px to 3
        taps[2].flatten(1),  # 9 px as they are
        last.mean((2, 3)),
    ]
    found = features(trunk, trunk.recipe, pool=(6, 3, 20, 1), average=True)
    for i, feature_ND in enumerate(wanted):
        stacked_ND = torch.stack([found[int(n)][i] for n in batch.index])
        torch.testing.assert_close(stacked_ND, feature_ND, rtol=1e-4, atol=1e-5)
    largest = features(trunk, trunk.recipe, pool=(6, 3, 20, 1))
    for i, feature_ND in enumerate(F.max_pool2d(taps[0], 6).flatten(1)[:5]):
        torch.testing.assert_close(largest[int(batch.index[i])][0], feature_ND, rtol=1e-4, atol=1e-5)


def test_features_of_unit_length(tmp_path):
    trunk = open_trunk(str(saved(tmp_path / "net.pt")), "probe")
    plain, unit = (features(trunk, trunk.recipe, pool=2, unit_length=u) for u in (False, True))
    for one, other in zip(plain[170], unit[170], strict=True):
        torch.testing.assert_close(other, one / one.square().sum().sqrt())


@pytest.mark.parametrize(
    ("model", "size", "pool", "wanted"),
    [
        ("resnet20", 32, 23, [16 * 23**2, 32 * 16**2, 64 * 8**2, 64]),
        ("resnet18", 64, 5, [64 * 5**2, 128 * 5**2, 256 * 4**2, 512 * 2**2, 512]),
        ("mobilenet_v2", 64, 3, [24 * 9, 32 * 9, 64 * 9, 96 * 9, 160 * 4, 320 * 4, 1280]),
    ],
)
def test_stages_and_sides_of_backbones(tmp_path, model, size, pool, wanted):
    """A map smaller than the side that is asked for stays as it is."""
    trunk = open_trunk(str(saved(tmp_path / "net.pt", "--target.model", model, "--data.size", str(size))), "probe")
    layers = [*range(1, len(wanted)), 0]
    found = StageFeatures(trunk, layers, pool=pool, average=True)(torch.zeros(1, 3, size, size))
    assert [f.shape[1] for f in found] == wanted and all(f.dtype == torch.float32 for f in found)


def test_what_is_opened_is_frozen_and_known_by_its_file(tmp_path):
    path = saved(tmp_path / "net.pt")
    trunk = open_trunk(str(path), "probe")
    assert not trunk.backbone.training and not any(p.requires_grad for p in trunk.backbone.parameters())
    before = {k: v.clone() for k, v in trunk.backbone.state_dict().items()}
    features(trunk, trunk.recipe, pool=2)
    assert all(torch.equal(v, before[k]) for k, v in trunk.backbone.state_dict().items())
    state = torch.load(path, weights_only=True)["target"]
    assert all(torch.equal(v, state[f"backbone.{k}"]) for k, v in before.items())
    other = open_trunk(str(saved(tmp_path / "other.pt", "--optim.lr", "0.2")), "probe")
    assert trunk.sha256 != other.sha256 and trunk.path == path


def test_mistakes_are_sentences(tmp_path):
    trunk = open_trunk(str(saved(tmp_path / "net.pt")), "probe")
    with pytest.raises(ValueError, match=r"^pretext\.layer: 4, but resnet20 has stages 1 to 3 \(0: what it pools\)$"):
        StageFeatures(trunk, [1, 4])
    with pytest.raises(ValueError, match=r"^probe: there is no checkpoint .*nowhere$"):
        open_trunk(str(tmp_path / "nowhere"), "probe")
    with pytest.raises(ValueError, match=r"^data\.labels: .* is no run's folder: it has no checkpoints/selected\.pt$"):
        open_trunk(str(tmp_path), "data.labels")
