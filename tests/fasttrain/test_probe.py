"""Linear probes: the classifier against scikit-learn, real labels whatever the run has learned from, and test labels unseen."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain.loaders import Dataset, open_dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler

from fasttrain import probe as package
from fasttrain.build import build
from fasttrain.pretext.features import open_trunk
from fasttrain.probe import Standard, fit, probe
from fasttrain.recipe import load
from fasttrain.tasks import MultiLabel
from fasttrain.trainer import Trainer

from .test_command_line import refused
from .test_features import PUZZLE, TEST_N, features, saved

SMALL = (
    "--data.size",
    "12",
    "--data.stored",
    "12",
    "--optim.epochs",
    "1",
    "--method.name",
    "scratch",
    "--run.tensorboard",
    "false",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """One that has learned labels for an epoch; its folder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    Trainer(build(load("smoke", [*SMALL, "--data.labelled", "60"])), folder, folder / "recall", lambda _: None).fit()
    return folder


@pytest.fixture(scope="module")
def found(run) -> dict:
    """Its probe."""
    torch.set_num_threads(1)
    return probe(str(run))


def samples(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of uneven scales, float64 [90, 12], and classes of which they tell something, int64 [90]."""
    random = np.random.default_rng(seed)
    feature_ND = random.normal(size=(90, 12)) * np.linspace(0.1, 20, 12) + np.arange(12)
    score_NK = feature_ND @ random.normal(size=(12, 4)) / 10 + random.normal(size=(90, 4))
    return torch.from_numpy(feature_ND), torch.from_numpy(score_NK.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
def test_the_classifier_is_that_of_scikit_learn(l2, dtype):
    feature_ND, targets_N = samples()
    scaled = StandardScaler().fit_transform(feature_ND.numpy()) / np.sqrt(12)
    theirs = LogisticRegression(C=1 / (l2 * 90), tol=1e-10, max_iter=10_000).fit(scaled, targets_N.numpy())
    x_ND = feature_ND.to(dtype)
    ours = fit(Standard.of(x_ND).apply_(x_ND), targets_N, 4, l2=l2)
    np.testing.assert_allclose(x_ND.numpy(), scaled, atol=1e-5)
    np.testing.assert_allclose(ours(x_ND).softmax(1).numpy(), theirs.predict_proba(scaled), atol=1e-3)
    np.testing.assert_allclose(ours.weight_DK.T.numpy(), theirs.coef_, rtol=1e-2, atol=1e-3 * abs(theirs.coef_).max())
    assert 0 <= ours.gap <= (1e-6 if dtype == torch.float64 else 1e-5)
    again = fit(x_ND, targets_N, 4, l2=l2, start=fit(x_ND, targets_N, 4, l2=l2 * 10))
    assert again.objective == pytest.approx(ours.objective, abs=2e-5)


def test_many_labels_are_as_many_classifiers_of_those_that_are_counted():
    feature_ND, targets_N = samples()
    standard = Standard.of(feature_ND)
    x_ND = standard.apply_(feature_ND)
    targets_NK = torch.stack([targets_N == 0, targets_N < 2], dim=1).float()
    targets_NK[60:, 1] = -1
    ours = fit(x_ND, targets_NK, 2, l2=1e-3)
    for k, count in enumerate((90, 60)):
        theirs = LogisticRegression(C=1 / (1e-3 * 90), tol=1e-10, max_iter=10_000)
        theirs.fit(x_ND[:count].numpy(), targets_NK[:count, k].numpy())
        wanted_N = theirs.predict_proba(x_ND.numpy())[:, 1]
        np.testing.assert_allclose(ours(x_ND)[:, k].sigmoid().numpy(), wanted_N, atol=1e-3)


def test_features_that_hardly_vary_in_training_are_not_blown_up():
    feature_ND = samples()[0]
    feature_ND[:, 0], feature_ND[:, 1] = 3.0, 0.0
    feature_ND[0, 1] = 1e-9
    standard = Standard.of(feature_ND)
    other_ND = standard.apply_(samples(1)[0])
    assert other_ND.isfinite().all() and other_ND[:, 1].abs().max() < 1e4
    assert torch.equal(Standard.of(torch.ones(4, 3)).apply_(torch.full((1, 3), 2.0)), torch.full((1, 3), 3**-0.5))


def test_every_stage_has_its_row(run, found):
    assert [(r["layer"], r["name"], r["features"]) for r in found["rows"]] == [
        (1, "stage 1", 16 * 12**2),
        (2, "stage 2", 32 * 6**2),
        (3, "stage 3", 64 * 3**2),
        (0, "pooled", 64),
    ]
    assert found["images"] == {"train": 60, "val": 33, "test": 80} and found["labelled"] == 60
    assert (found["data"], found["split"], found["metric"]) == ("toy", "test", "accuracy")
    assert found["chance"] == pytest.approx(100 * 26 / 80)  # of each class 20 images in training; the first is named
    for row in found["rows"]:
        assert row["l2"] in package.L2 and row["random_l2"][0] in package.L2
        assert (
            {"accuracy", "balanced_accuracy", "loss"} == row["val"].keys() == row["test"].keys() == row["random"].keys()
        )


def test_maps_are_pooled_to_at_most_9000_numbers(tmp_path):
    for model, wanted in (
        ("resnet20", [16 * 23**2, 32 * 16**2, 64 * 11**2, 64]),
        ("resnet18", [64 * 11**2, 128 * 6**2, 256 * 3**2, 512 * 2**2, 512]),
    ):
        trunk = open_trunk(str(saved(tmp_path / f"{model}.pt", "--target.model", model)), "probe")
        found = package._network(trunk, [*range(1, len(wanted)), 0])(torch.zeros(1, 3, 48, 48))
        assert [f.shape[1] for f in found] == wanted


def test_a_row_is_a_classifier_on_the_features_of_its_stage(run, found):
    """Of what is pooled, by scikit-learn, with the L2 penalty that was chosen."""
    trunk = open_trunk(str(run), "probe")
    parts = build(trunk.recipe)
    targets_N, train_N = parts.dataset.targets_N, parts.train_spec.index_N
    pooled = features(trunk, trunk.recipe) | features(trunk, trunk.recipe, index_N=train_N)
    train_ND, test_ND = (np.stack([pooled[int(i)][3].numpy() for i in index_N]) for index_N in (train_N, TEST_N))
    scaler = StandardScaler().fit(train_ND)
    l2, figures = (found["rows"][3][k] for k in ("l2", "test"))
    theirs = LogisticRegression(C=1 / (l2 * 60), tol=1e-9, max_iter=100_000)
    theirs.fit(scaler.transform(train_ND) / 8, targets_N[train_N])
    share_NK = theirs.predict_proba(scaler.transform(test_ND) / 8)
    loss = -np.log(share_NK[np.arange(80), targets_N[TEST_N]]).mean()
    assert figures["loss"] == pytest.approx(loss, rel=0.01)
    assert figures["accuracy"] == pytest.approx(100 * (share_NK.argmax(1) == targets_N[TEST_N]).mean(), abs=0.01)


def test_two_calls_give_the_same_figures_and_leave_the_run_as_it_was(run, found):
    file = run / "checkpoints/selected.pt"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    assert probe(str(run)) == found
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before == found["sha256"]
    left = json.loads((run / "probe.json").read_text())
    assert {k: left[k] for k in found} == found
    assert left["overrides"] == {} and {"machine", "versions", "commit"} <= left.keys()


def test_random_weights_are_those_that_a_seed_gives(run, found):
    several = probe(str(run), layers=[0], seeds=2)
    (row,) = several["rows"]
    first = found["rows"][3]
    assert row["test"] == first["test"] and row["random_l2"][0] == first["random_l2"][0]
    values = [first["random"]["accuracy"], 2 * row["random"]["accuracy"] - first["random"]["accuracy"]]
    assert row["random_std"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    assert "random_std" not in first


def changed(monkeypatch, change) -> None:
    """Data sets are opened as ``change`` makes them."""
    before = package.open_data
    monkeypatch.setattr(package, "open_data", lambda recipe: change(before(recipe)))


def test_test_labels_are_not_looked_at_when_l2_is_chosen(run, found, monkeypatch):
    def permuted(dataset: Dataset) -> Dataset:
        targets_N, test_N = dataset.targets_N.copy(), dataset.splits["test"]
        targets_N[test_N] = np.random.default_rng(3).permutation(targets_N[test_N])
        return replace(dataset, targets_N=targets_N)

    changed(monkeypatch, permuted)
    other = probe(str(run), layers=[3, 0])
    kept = ("layer", "name", "features", "l2", "val", "random_l2", "random_val")
    for row, its in zip(found["rows"][2:], other["rows"], strict=True):
        assert {k: row[k] for k in kept} == {k: its[k] for k in kept}
        assert row["test"] != its["test"] and row["random"] != its["random"]


def test_the_validation_split_alone(run, found):
    kept = (run / "probe.json").read_bytes()
    content = probe(str(run), split="val", layers=[3])
    (row,) = content["rows"]
    assert content["images"] == {"train": 60, "val": 33} and "test" not in row
    assert row["val"] == found["rows"][2]["val"] and row["random"] == found["rows"][2]["random_val"]
    assert (run / "probe.json").read_bytes() == kept  # which is of the test split


def test_labels_and_data_as_asked(run):
    content = probe(str(run), ["--data.size", "16", "--data.val_share", "0.1"], labelled=30, layers=[2])
    assert content["labelled"] == 30 and content["images"]["val"] < 33 and content["rows"][0]["features"] == 32 * 8**2
    left = json.loads((run / "probe.json").read_text())["overrides"]
    assert left == {"data.size": 16, "data.val_share": 0.1, "data.labelled": 30}


def test_a_puzzles_run_is_probed_by_the_data_sets_labels(tmp_path):
    """On whole images, standardised as its tiles were."""
    (tmp_path / "indices.txt").write_text("\n".join(map(str, open_dataset("toy", val_share=0.2).splits["train"][:9])))
    indices = ("--data.indices", str(tmp_path / "indices.txt"))
    path = saved(tmp_path / "net.pt", *indices, *PUZZLE)
    content = probe(str(path), layers=[0])
    assert content["images"]["train"] == 127  # not those of which puzzles were made
    assert content["metric"] == "accuracy" and content["chance"] > 30  # of 3 classes, not of 20 orders
    assert probe(str(path), ["--data.seed", "1"], layers=[0])["rows"] == content["rows"]  # no puzzle is drawn
    assert probe(str(path), indices, split="val", layers=[0])["labelled"] == 9  # asked for
    trunk = open_trunk(str(path), "probe")
    network, x = package._network(trunk, [1]), torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(network(10 + 0.5 * x)[0], network(x)[0], rtol=1e-3, atol=1e-4)


def test_the_papers_protocol_does_not_choose_l2_on_the_test_split(tmp_path):
    path = saved(tmp_path / "net.pt", *SMALL, "--run.protocol", "paper")
    assert probe(str(path), layers=[0])["images"] == {"train": 127, "val": 33, "test": 80}


def test_many_labels(tmp_path, monkeypatch):
    """Class mAP, as scikit-learn's, of the toy's classes and one that two of them share."""
    path = saved(tmp_path / "net.pt", *SMALL)

    def many(dataset: Dataset) -> Dataset:
        shown_NK = np.eye(3, dtype=np.float32)[dataset.targets_N]
        shown_NK = np.concatenate([shown_NK, shown_NK[:, :1] + shown_NK[:, 1:2]], axis=1)
        shown_NK[::9, 2] = -1
        return replace(dataset, classes=("a", "b", "c", "d"), targets_N=shown_NK)

    told = []

    class Told(MultiLabel):
        def evaluate(self, logits_NK, targets_NK):
            told.append((logits_NK, targets_NK))
            return super().evaluate(logits_NK, targets_NK)

    changed(monkeypatch, many)
    monkeypatch.setitem(package.TASKS, "multi_label", Told)
    content = probe(str(path), layers=[3])
    row = content["rows"][0]
    assert content["metric"] == "map" and row["test"].keys() == {"map", "map_11point", "sample_ap", "loss"}
    logits_NK, targets_NK = told[len(package.L2)]
    ap = [
        average_precision_score(t[t >= 0].numpy(), s[t >= 0].numpy())
        for s, t in zip(logits_NK.T, targets_NK.T, strict=True)
    ]
    assert row["test"]["map"] == pytest.approx(100 * np.mean(ap))
    shares = [float((t > 0).sum() / (t >= 0).sum()) for t in targets_NK.T]
    assert content["chance"] == pytest.approx(100 * np.mean(shares), rel=1e-5)
    with pytest.raises(ValueError, match=r"^data\.labelled: parts of a multi-label data set are not made"):
        probe(str(path), labelled=30)


def test_the_command_line(run, found, fasttrain):
    out = fasttrain("probe", str(run), "--json", "--layers", "3,0", "--seeds", "1", "--split", "test")
    assert out.returncode == 0, out.stderr
    content = json.loads(out.stdout)
    assert content["rows"] == found["rows"][2:] and "features of 60 + 33 + 80 images" in out.stderr
    said = fasttrain("probe", str(run), "--layers=0", "--seeds=2", "--labelled", "30", "--data.val_share", "0.3").stdout
    row = json.loads((run / "probe.json").read_text())["rows"][0]
    figures = (row["test"]["accuracy"], row["random"]["accuracy"], row["random_std"]["accuracy"])
    assert all(f"{value:.2f}" in said for value in figures) and "30 labels" in said and "pooled" in said


def test_mistakes_are_sentences(run, tmp_path, fasttrain):
    refused(fasttrain("probe"), "probe needs a run's folder or a checkpoint")
    refused(fasttrain("probe", "nowhere"), "probe: there is no checkpoint nowhere")
    refused(fasttrain("probe", str(run), "--split", "train"), "--split is test or val, not 'train'")
    refused(
        fasttrain("probe", str(run), "--layers", "4"), "--layers: 4, but resnet20 has stages 1 to 3 (0: what it pools)"
    )
    refused(fasttrain("probe", str(run), "--layers", "one"), "--layers: 'one' is not a list of numbers such as 1,2,0")
    refused(fasttrain("probe", str(run), "--labelled", "-3"), "--labelled: '-3' is not a whole number")
    refused(fasttrain("probe", str(run), "--labelled", "2"), "data.labelled: 2 is not between 3 (the classes)")
    refused(fasttrain("probe", str(run), "--seeds", "0"), "--seeds: 0 is below 1")
    refused(fasttrain("probe", str(run), "--data.frames", "4"), "data.frames: 4, but resnet20 sees images; set it to 0")
    refused(fasttrain("probe", str(run), "--data.nme", "toy"), "there is no field data.nme; did you mean data.name?")
    clips = saved(
        tmp_path / "clips.pt",
        "--data.name",
        "motion",
        "--data.frames",
        "4",
        "--target.model",
        "resnet3d18",
        "--target.width",
        "0.125",
    )
    refused(fasttrain("probe", str(clips)), "was trained on clips; its features of images cannot be made")
