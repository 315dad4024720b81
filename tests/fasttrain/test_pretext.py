"""From a puzzle to pseudo-labels to any network: every step is what it says, is kept, and does not depend on how it was run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from fasttrain.loaders.order import rank_part
from fasttrain.loaders.tiny import write_tiny
from PIL import Image

from fasttrain import caching, checkpoint, compare
from fasttrain.build import build, open_data
from fasttrain.pretext import labels as making
from fasttrain.pretext import steps
from fasttrain.pretext.data import with_given_labels
from fasttrain.pretext.features import StageFeatures, collect, open_trunk, whole_images
from fasttrain.pretext.files import open_labels, place_of, read_centroids
from fasttrain.pretext.labels import make_labels, read_labels
from fasttrain.recipe import Pretext, Recipe, Source, load, row
from fasttrain.samples import used_indices

from .test_command_line import nothing_written, refused

PUZZLE = {"task": "jigsaw", "grid": 2, "permutations": 4, "width": 8, "hidden": 16}
ROWS = {
    "puzzle": {"pretext": PUZZLE, "run": {"once": True}},
    "pseudo": {"data": {"labels": "row:puzzle"}},
    "tuned": {"target": {"weights": "row:pseudo"}},
}
FIELDS = {
    "data": {"name": "toy", "size": 16, "stored": 16, "batch": 32, "pad": 2, "val_share": 0.2},
    "target": {"model": "resnet20"},
    "method": {"name": "scratch"},
    "pretext": {"clusters": 6},
    "optim": {"epochs": 1, "lr": 0.05},
    "run": {"eval_every": 1, "tensorboard": False, "precision": "fp32"},
}

TRAINED_ON = 127  # images of toy's training split


@pytest.fixture
def recipe_of(tmp_path):
    """A recipe of little work with these rows."""

    def make(rows: dict | None = None, *overrides: str, **changes) -> Recipe:
        path = tmp_path / "steps.yaml"
        path.write_text(yaml.safe_dump(FIELDS | {"rows": ROWS if rows is None else rows} | changes))
        return load(str(path), ["--run.dir", str(tmp_path / "runs"), *overrides])

    return make


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A run that solved puzzles, once for all tests that only read it; and notes of what it told."""
    path = tmp_path_factory.mktemp("pretext")
    (path / "steps.yaml").write_text(yaml.safe_dump(FIELDS | {"name": "puzzle", "pretext": PUZZLE}))
    recipe = load(str(path / "steps.yaml"), ["--run.dir", str(path / "runs")])
    torch.set_num_threads(1)
    compare.run(recipe, quiet)
    return path / "runs/puzzle"


@pytest.fixture
def wanting(solved, recipe_of, tmp_path):
    """A recipe that wants pseudo-labels of a copy of that run."""
    folder = tmp_path / "solved"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/selected.pt").write_bytes((solved / "checkpoints/selected.pt").read_bytes())

    def make(*overrides: str) -> Recipe:
        return recipe_of({}, "--data.labels", str(folder), *overrides)

    return make


def quiet(label, line) -> None:
    pass


def silent(text: str) -> None:
    pass


def files_of(folder) -> dict:
    return {p.name: p.stat().st_mtime_ns for p in (folder / "clusters").iterdir()}


def test_the_four_steps_once_and_never_again(recipe_of, tmp_path, monkeypatch):
    recipe = recipe_of(None, "--run.seeds", "2")
    table = compare.run(recipe, quiet)
    assert {r["name"]: (r["learns"], r["seeds"]) for r in table["rows"]} == {
        "puzzle": ("order of tiles, 4 orders", 1),
        "pseudo": ("clusters, 6", 2),
        "tuned": ("labels", 2),
    }
    root = tmp_path / "runs/steps"
    assert not (root / "puzzle/seed1").exists()
    for seed in (0, 1):
        begun = checkpoint.load(root / f"tuned/seed{seed}/checkpoints/selected.pt")["recipe"]["target"]["weights"]
        assert begun == str(root / f"pseudo/seed{seed}/checkpoints/selected.pt")
        learned = checkpoint.load(root / f"pseudo/seed{seed}/checkpoints/selected.pt")
        assert learned["recipe"]["data"]["labels"] == str(root / "puzzle/seed0")
        assert list(learned["classes"]) == [f"cluster {i}" for i in range(6)]
    made = files_of(root / "puzzle/seed0")
    assert sorted(name.partition("-")[0] for name in made) == ["centroids", "features", "labels"]
    monkeypatch.setattr(making, "collect", None)  # nothing is computed any more
    assert compare.run(recipe, quiet)["rows"] == table["rows"]
    assert files_of(root / "puzzle/seed0") == made


def test_a_label_is_the_nearest_centroid_of_the_trunks_features(wanting):
    recipe = wanting()
    make_labels(recipe, silent)
    found = read_labels(recipe)
    trunk = open_trunk(recipe.data.labels, "data.labels")
    parts = build(
        replace(with_given_labels(recipe), data=replace(recipe.data, labels=None, crop="centre", flip="none", views=1))
    )
    feature_of = {}
    for split in ("val", "test"):
        loader = parts.loaders[split]
        loader.set_epoch(0)
        for batch in loader:
            x = batch.pixels.float()
            x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True, correction=0)
            feature_BD = trunk.backbone.pool(trunk.backbone(x)[1]).double()
            feature_BD /= feature_BD.norm(dim=1, keepdim=True)
            feature_of |= dict(zip(batch.index.tolist(), feature_BD, strict=True))
    assert len(feature_of) == 240 - TRAINED_ON
    place = place_of(recipe.data.labels, recipe)
    centroid_KD = read_centroids(place.centroids_file()).centroid_KD.double()
    index = list(feature_of)
    distance_NK = torch.cdist(torch.stack([feature_of[i] for i in index]), centroid_KD)
    two = distance_NK.sort(1).values
    clear = two[:, 1] - two[:, 0] > 1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(distance_NK.argmin(1)[clear], torch.from_numpy(found.label_N[index])[clear])
    assert np.allclose(found.distance2_N[index], two[:, 0].square(), rtol=1e-3, atol=1e-6)
    assert found.count == 6 and set(found.label_N) == set(range(6))


@pytest.mark.parametrize(
    "changes", [("--data.batch", "7"), ("--data.loader", "torch", "--data.workers", "2"), ("--run.seed", "5")]
)
def test_labels_do_not_depend_on_batches_loaders_and_seeds(wanting, changes, tmp_path):
    first = wanting()
    make_labels(first, silent)
    labels = read_labels(first)
    for path in (tmp_path / "solved/clusters").iterdir():
        path.unlink()
    again = wanting(*changes)
    make_labels(again, silent)
    assert np.array_equal(read_labels(again).label_N, labels.label_N)
    assert np.array_equal(read_labels(again).distance2_N, labels.distance2_N)


@pytest.mark.parametrize("ranks", [2, 3])
def test_labels_do_not_depend_on_ranks(wanting, ranks):
    """Every rank computes the features of its own images; together they are those of one."""
    recipe = wanting()
    make_labels(recipe, silent)
    dataset, place = open_data(with_given_labels(recipe)), place_of(recipe.data.labels, recipe)
    trunk = open_trunk(recipe.data.labels, "data.labels")
    index_N, features = np.arange(len(dataset)), []
    for rank in range(ranks):
        spec = whole_images(rank_part(index_N, rank, ranks), dataset, trunk.recipe.data, "error")
        loader = making.open_loader("resident", spec)
        features += [
            f
            for _, (f,) in collect(
                StageFeatures(trunk, [0], unit_length=True), loader, trunk.recipe, torch.device("cpu"), torch.float32
            )
        ]
    centroid_KD = read_centroids(place.centroids_file()).centroid_KD
    label_N1, _ = making.nearest(torch.cat(features), centroid_KD)
    assert np.array_equal(label_N1[:, 0].numpy(), read_labels(recipe).label_N)


def test_each_step_goes_on_where_it_was_stopped(wanting, monkeypatch, tmp_path):
    recipe = wanting()
    make_labels(recipe, silent)
    labels, whole = read_labels(recipe), collect
    for path in (tmp_path / "solved/clusters").iterdir():
        path.unlink()
    seen = []

    def stopped_after(count):
        def some(*arguments):
            for i, (index, features) in enumerate(whole(*arguments)):
                if i == count:
                    raise KeyboardInterrupt
                seen.append(len(index))
                yield index, features

        return some

    monkeypatch.setattr(making, "collect", stopped_after(3))
    with pytest.raises(KeyboardInterrupt):
        make_labels(recipe, silent)
    monkeypatch.setattr(making, "kmeans", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(making, "collect", stopped_after(100))
    with pytest.raises(KeyboardInterrupt):
        make_labels(recipe, silent)
    assert sum(seen) == TRAINED_ON  # the training images, each once
    monkeypatch.undo()
    monkeypatch.setattr(making, "collect", stopped_after(100))
    make_labels(recipe, silent)
    assert sum(seen) == 240
    assert np.array_equal(read_labels(recipe).label_N, labels.label_N)


def test_another_k_shares_the_features(wanting, monkeypatch):
    make_labels(wanting(), silent)
    monkeypatch.setattr(making, "collect", None)
    other = wanting("--pretext.clusters", "3")
    make_labels(other, silent)
    assert set(read_labels(other).label_N) == {0, 1, 2}


def test_another_data_set_gets_labels_from_the_same_centroids(wanting, tmp_path):
    make_labels(wanting(), silent)
    write_tiny("cifar10", tmp_path / "tiny", samples=4)
    other = wanting(
        "--data.name",
        "cifar10",
        "--data.root",
        str(tmp_path / "tiny"),
        "--data.verify",
        "false",
        "--data.val_share",
        "0.5",
    )
    notes: list[str] = []
    make_labels(other, notes.append)
    assert [note.partition(":")[0] for note in notes] == ["features", "pseudo-labels"]
    assert len(read_labels(other).label_N) == len(open_data(with_given_labels(other)))
    assert sum("centroids" in p.name for p in (tmp_path / "solved/clusters").iterdir()) == 1


def test_only_images_that_are_used_get_labels(wanting):
    some, every = wanting("--data.labelled", "20"), wanting()
    notes: list[str] = []
    make_labels(some, notes.append)
    first = read_labels(some)
    dataset = open_data(some)
    assert (first.label_N >= 0).sum() == 240 - TRAINED_ON + 20 and np.isinf(first.distance2_N).sum() == TRAINED_ON - 20
    assert np.array_equal(np.flatnonzero(first.label_N >= 0), used_indices(some, dataset))
    make_labels(every, notes.append)
    assert [note.split(" images")[0] for note in notes if note.startswith("pseudo")] == [
        "pseudo-labels: 133",
        "pseudo-labels: 107",
    ]
    known = first.label_N >= 0
    assert np.array_equal(read_labels(every).label_N[known], first.label_N[known])
    assert np.array_equal(read_labels(some).label_N, first.label_N)  # what a run began with stays what it is


def test_an_image_that_cannot_be_read_is_named_or_left_without_features(wanting, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / f"images/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images/a/4.png").write_bytes(b"no image")
    data = ("--data.name", "folder", "--data.root", str(tmp_path / "images"), "--data.val_share", "0.3")
    with pytest.raises(ValueError, match=r"a/4\.png"):
        make_labels(wanting(*data), silent)
    notes: list[str] = []
    recipe = wanting(*data, "--data.on_bad_sample", "skip")
    make_labels(recipe, notes.append)
    assert "features: 1 images of folder cannot be read; their features are taken to be 0" in notes
    assert (read_labels(recipe).label_N >= 0).all()


def test_labels_of_other_weights_or_stages_are_not_taken(wanting, tmp_path):
    make_labels(wanting(), silent)
    for change in (("--pretext.layer", "1"), ("--pretext.unit_length", "false"), ("--pretext.iterations", "3")):
        with pytest.raises(ValueError, match="has no pseudo-labels of toy from 6 clusters yet"):
            read_labels(wanting(*change))
    path = tmp_path / "solved/checkpoints/selected.pt"
    state = checkpoint.load(path)
    state["target"]["backbone.conv1.weight"] += 1
    checkpoint.save(path, state)
    with pytest.raises(ValueError, match="yet"):
        read_labels(wanting())
    state["dataset"] = "another"
    checkpoint.save(path, state)
    with pytest.raises(ValueError, match="the data set toy in made up has changed since"):
        make_labels(wanting(), silent)


def test_damaged_labels_are_made_again(wanting):
    recipe = wanting()
    path = make_labels(recipe, silent)
    labels = read_labels(recipe)
    content = bytearray(path.read_bytes())
    content[-3] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="make the rest"):
        read_labels(recipe)
    make_labels(recipe, silent)
    assert np.array_equal(read_labels(recipe).distance2_N, labels.distance2_N)


def test_soft_assignments_teach_as_a_source_does(wanting, solved, tmp_path):
    source = {"name": "clusters", "model": "clusters", "weights": str(tmp_path / "solved"), "classes": 6, "size": 16}
    recipe = replace(
        wanting("--method.name", "kd", "--method.weight", "1.0", "--data.views", "2"), sources=[Source(**source)]
    )
    table = compare.run(recipe, quiet)
    assert table["rows"][0]["sources"] == ["clusters"]
    (kept,) = (tmp_path / "runs/steps/recall").glob("clusters-*.soft")
    assert kept.stat().st_size > 2 * 240 * 6 * 4
    parts = build(recipe)
    (network,) = parts.networks
    batch = next(iter(parts.loaders["val"]))
    logits_BK = network(batch.pixels).double()
    place = place_of(recipe.data.labels, recipe)
    centroids = read_centroids(place.centroids_file())
    trunk = open_trunk(recipe.data.labels, "data.labels")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (recipe.data.mean, recipe.data.std))
    (feature_BD,) = StageFeatures(trunk, [0], unit_length=True)((batch.pixels - mean) / std)
    distance2_BK = torch.cdist(feature_BD.double(), centroids.centroid_KD.double()).square()
    wanted_BK = (-distance2_BK / (0.5 * centroids.mean_distance2)).softmax(1)
    assert torch.allclose(logits_BK.softmax(1), wanted_BK, atol=2e-4)
    assert centroids.images == TRAINED_ON


def test_soft_assignments_can_be_computed_ahead(recipe_of, solved):
    source = {"name": "its", "model": "clusters", "weights": str(solved), "classes": 6, "size": 16}
    recipe = recipe_of({}, "--method.name", "sskt", "--data.views", "2", sources=[source])
    (file,) = caching.run(recipe, silent, lambda fill: None)["files"]
    assert (file["labels"], file["views"]) == (2 * TRAINED_ON, 2)


def test_a_recipe_without_rows_gets_those_of_the_four_steps(recipe_of):
    recipe = steps.with_steps(recipe_of({}, "--data.labelled", "30", "--pretext.model", "resnet32"))
    rows = {name: row(recipe, changes) for name, changes in recipe.rows.items()}
    assert list(rows) == ["puzzle", "pseudo-labels", "fine-tuned", "scratch"]
    assert [r.data.labelled for r in rows.values()] == [0, 0, 30, 30]
    assert [r.target.model for r in rows.values()] == ["resnet32", "resnet20", "resnet20", "resnet20"]
    assert [r.run.once for r in rows.values()] == [True, False, False, False]
    assert [str(r.data.labels or r.target.weights) for r in rows.values()] == [
        "None",
        "row:puzzle",
        "row:pseudo-labels",
        "None",
    ]
    assert len(compare.jobs_of(replace(recipe, run=replace(recipe.run, seeds=3)))) == 10


def test_the_command_shows_its_steps_and_runs_them_small(recipe_of, fasttrain, tmp_path):
    recipe_of({}, "--data.labelled", "30")
    out = fasttrain("pretext", "steps.yaml", "--budget", "smoke", "--data.loader", "resident")
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[:4] == [
        "1. puzzle: puzzle",
        "2. clusters: 4",
        "3. pseudo-labels: pseudo-labels",
        "4. labels: scratch, fine-tuned",
    ]
    assert (tmp_path / "runs/steps-smoke/report.html").is_file()
    rows = fasttrain("pretext", "steps.yaml", "--rows")
    (tmp_path / "own.yaml").write_text(rows.stdout)
    assert list(load(str(tmp_path / "own.yaml")).rows) == ["puzzle", "pseudo-labels", "fine-tuned", "scratch"]


def test_mistakes_are_sentences(recipe_of, wanting, fasttrain, tmp_path):
    recipe_of({"a": {}, "b": {}})
    refused(fasttrain("pretext", "steps.yaml"), "rows: none of them has pretext.task or data.labels")
    refused(fasttrain("pretext", "steps.yaml", "--budget", "half"), "--budget is full or smoke, not 'half'")
    refused(fasttrain("pretext"), "pretext needs a recipe")
    refused(
        fasttrain("train", "steps.yaml", "--rows", "{}", "--data.labels", "no/such"),
        "data.labels: there is no run or checkpoint no/such",
    )
    recipe_of({"a": {"data": {"labels": "row:c"}}})
    refused(fasttrain("train", "steps.yaml"), "data.labels: row:c is no other row")
    nothing_written(tmp_path)
    with pytest.raises(ValueError, match=r"pretext\.clusters: 128"):
        make_labels(wanting("--pretext.clusters", str(TRAINED_ON + 1)), silent)
    with pytest.raises(ValueError, match=r"pretext\.layer: 4, but resnet20 has stages 1 to 3"):
        make_labels(wanting("--pretext.layer", "4"), silent)
    with pytest.raises(ValueError, match=r"has classes 5, and pretext.clusters is 6"):
        source = Source("its", "clusters", str(tmp_path / "solved"), classes=5, size=16)
        build(replace(wanting("--method.name", "sskt", "--data.labels", "null"), sources=[source]))
    with pytest.raises(ValueError, match="has no 6 clusters yet"):
        source = Source("its", "clusters", str(tmp_path / "solved"), classes=6, size=16)
        build(replace(wanting("--method.name", "sskt", "--data.labels", "null"), sources=[source]))


def test_pretext_settings_that_make_no_difference_share_their_files(wanting, solved):
    a, b = (place_of(str(solved), wanting(*more)) for more in ((), ("--pretext.pool", "4", "--pretext.softness", "2")))
    assert a.centroids_file() == b.centroids_file()
    assert Pretext().clusters == 1000 and open_labels  # the published k is the default
