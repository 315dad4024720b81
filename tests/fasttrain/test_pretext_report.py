"""Tables and pages of rows that answer different questions: labels, puzzles, clusters."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain.kernels import network_input
from PIL import Image
from rich.console import Console

from fasttrain import compare, figures, report, report_data, saliency, show
from fasttrain.build import build, open_data
from fasttrain.pretext import pictures
from fasttrain.pretext.data import with_given_labels
from fasttrain.pretext.files import PseudoLabels
from fasttrain.pretext.labels import make_centroids, read_labels
from fasttrain.recipe import Source, load

from .test_report import Made

ROWS = {
    "jigsaw": {"pretext": {"task": "jigsaw"}, "run": {"once": True}},
    "five": {"data": {"labels": "row:jigsaw"}},
    "six": {"data": {"labels": "row:jigsaw"}, "pretext": {"clusters": 6}, "run": {"once": True}},
    "seven": {"data": {"labels": "row:jigsaw"}, "pretext": {"clusters": 7}, "run": {"once": True}},
    "scratch": {"run": {"once": True}},
}
LITTLE = "--data.size 36 --data.stored 36 --data.labelled 40 --data.batch 20 --optim.epochs 1 --run.tensorboard false"
LITTLE += " --method.name scratch --run.precision fp32 --pretext.permutations 8 --pretext.width 8 --pretext.hidden 16"


class Pretext(Made):
    """The same, with ways to single rows."""

    def row(self, name: str) -> dict:
        return next(row for row in self.table["rows"] if row["name"] == name)

    def first(self, name: str) -> compare.Job:
        return next(job for job in self.jobs if job.row == name)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A puzzle, three kinds of its clusters, and labels; two seeds of some."""
    where = ("--run.dir", str(tmp_path_factory.mktemp("mixed")), "--seeds", "2", "--pretext.clusters", "5")
    return Pretext(replace(load("smoke", [*LITTLE.split(), *where]), rows=ROWS))


def shown_in(page: str) -> list[str]:
    return re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,', page)


def section(page: str, title: str) -> str:
    """What stands under a heading."""
    return re.split("<h2>", page.partition(f"<h2>{title}</h2>")[2])[0]


def printed(content: dict) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(show.table(content))
    return out.getvalue()


# tables


def test_each_row_has_its_own_question_and_metric(mixed):
    learned = {row["name"]: row["learns"] for row in mixed.table["rows"]}
    assert learned == {
        "jigsaw": "order of tiles, 8 orders",
        "five": "clusters, 5",
        "six": "clusters, 6",
        "seven": "clusters, 7",
        "scratch": "labels",
    }
    for row in mixed.table["rows"]:
        mine = [s for job, s in zip(mixed.jobs, mixed.summaries, strict=True) if job.row == row["name"]]
        assert {row["metric"]} == {s["metric"] for s in mine}
        assert row["mean"] == pytest.approx(np.mean([s["test"][row["metric"]] for s in mine]))
        assert row["val_mean"] == pytest.approx(np.mean([s["val"][row["metric"]] for s in mine]))
    assert mixed.table["metric"] == mixed.row("scratch")["metric"]
    assert (mixed.row("jigsaw")["seeds"], mixed.row("jigsaw")["std"]) == (1, None)
    assert mixed.row("five")["seeds"] == 2 and mixed.row("five")["std"] is not None


def test_chance_is_of_an_answer_that_does_not_look(mixed):
    assert mixed.row("jigsaw")["chance"] == 100 / 8 and "chance" not in mixed.row("scratch")
    dataset = open_data(mixed.first("six").recipe)
    count_K = np.bincount(dataset.targets_N[dataset.splits["test"]])
    assert mixed.row("six")["chance"] == pytest.approx(100 * count_K.max() / count_K.sum())
    unknown = [{k: v for k, v in s.items() if k != "details"} for s in mixed.summaries]
    table = compare.tabulate(mixed.recipe, mixed.jobs, unknown, 1)
    assert [row.get("chance", 0) for row in table["rows"]] == [12.5, None, None, None, 0]
    assert "│ six " in printed(table)


def test_the_tables_metric_is_that_of_the_labels(mixed):
    """Also where another row comes first, or where no row learns labels."""
    summaries = [
        s | {"metric": "balanced_accuracy"} if j.row == "scratch" else s
        for j, s in zip(mixed.jobs, mixed.summaries, strict=True)
    ]
    table = compare.tabulate(mixed.recipe, mixed.jobs, summaries, 1)
    assert table["metric"] == "balanced_accuracy" and table["rows"][0]["metric"] == "accuracy"
    only = {name: changes for name, changes in ROWS.items() if name != "scratch"}
    pairs = [(j, s) for j, s in zip(mixed.jobs, summaries, strict=True) if j.row != "scratch"]
    table = compare.tabulate(replace(mixed.recipe, rows=only), [j for j, _ in pairs], [s for _, s in pairs], 1)
    assert table["metric"] == "accuracy" and printed(table).count("test split") == 2


def test_no_puzzle_stands_in_the_column_of_the_data_sets_accuracy(mixed):
    parts = re.split(r"\n(?=\s*smoke[,:])", printed(mixed.table))
    assert [part.split("test split")[0].strip() for part in parts] == [
        "smoke:",
        "smoke, order of tiles:",
        "smoke, clusters:",
    ]
    rows = [re.findall(r"│ (\w+) ", part) for part in parts]
    assert rows == [["scratch"], ["jigsaw"], ["five", "six", "seven"]]
    assert "orders ┃ accuracy % ┃ chance %" in parts[1] and re.search(
        r"│ jigsaw │      8 │ +[\d.]+ │    12.50 │", parts[1]
    )
    assert re.search(r"clusters ┃ +accuracy % ┃ largest cluster %", parts[2])
    on_page = section(mixed.page, "Test split")
    assert re.findall("<h3>(.*)</h3>", on_page) == ["Order of tiles", "Clusters"]
    tables = re.findall(r"<table>(.*)</table>", on_page)
    assert [re.findall(r"<tr><td>(\w+)", t) for t in tables] == rows
    assert (
        "<th>orders<th>accuracy %<th>chance %" in tables[1]
        and "<td>8<td>" in tables[1]
        and "<td>12.50<td>" in tables[1]
    )


def test_rows_of_labels_alone_look_as_before():
    figure = {"mean": 50.0, "std": 1.0}
    common = {"learns": "labels", "metric": "accuracy", "images_per_s": 10.0, "seeds": 2}
    rows = [{"name": n, "test": {"loss": figure, "top5": figure, "accuracy": figure}, **common} for n in ("b", "a")]
    content = {"name": "run", "metric": "accuracy", "unit": "images", "side_by_side": 2, "rows": rows}
    text = printed(content)
    title = " ".join(text.partition("┏")[0].split())
    assert title == "run: test split, mean ± standard deviation of 2 seeds, 2 runs side by side"
    lines = [re.split(" *[┃│] *", line)[1:-1] for line in text.splitlines() if line[0] in "┃│"]
    cells = ["50.00 ± 1.00", "50.00 ± 1.00", "10"]
    assert lines == [["", "accuracy %", "top5 %", "images/s"], ["b", *cells], ["a", *cells]]
    (table,) = report._tables(content)
    assert table.startswith(
        "<table><tr><th><th>accuracy %<th>top-5 accuracy %<th>loss<th>images/s<th>seeds<tr><td>b<td>"
    )
    recipe = load("smoke", ["--method.name", "scratch"])
    methods = report._methods([compare.Job("the row", recipe, Path())])
    assert methods == (
        "<table class=words><tr><th><th>target<th>method<th><tr><td>the row<td>resnet20<td>scratch<td>labels alone</table>"
    )


# the page


def test_the_page_keeps_questions_apart(mixed):
    page = mixed.page
    assert "Not shown" not in page and "http" not in page
    titles = re.findall("<h2>(.*)</h2>", page)
    look = "What the networks look at"
    own = ["Puzzles: jigsaw", *(t for row in ("five", "six", "seven") for t in (f"Clusters: {row}", f"{look}: {row}"))]
    assert titles[titles.index("Curves") + 1 : titles.index("Where the time went")] == ["Classes", look, *own]
    curves = section(page, "Curves")
    headings = ["Labels", "Order of tiles, 8 orders", "Clusters, 5", "Clusters, 6", "Clusters, 7"]
    assert re.findall("<h3>(.*)</h3>", curves) == headings and shown_in(curves) == ["curves"] * 5
    assert shown_in(page).count("confusion matrices") == 1 and "scratch, on the test split" in section(page, "Classes")
    assert shown_in(section(page, "Puzzles: jigsaw")) == ["puzzles"]
    assert "No Grad-CAM of networks that solve puzzles" in section(page, "Puzzles: jigsaw")
    assert [shown_in(section(page, f"Clusters: {row}")) for row in ("five", "six", "seven")] == [["clusters"]] * 2 + [
        []
    ]
    assert "Not drawn: only clusters of the first two numbers are (5 and 6)." in section(page, "Clusters: seven")
    assert "Those of the first seed." in section(page, "Clusters: five")
    assert "<td>order of tiles, 8 orders: 3 x 3 tiles, up to 2 of them another image" in section(page, "Methods")
    assert "<td>clusters, 6: k-means of the pooled features of jigsaw/seed0<td>scratch<td>these alone" in page
    assert "<td>labels<td>scratch<td>labels alone" in page


def test_only_rows_that_are_asked_the_same_share_axes(mixed):
    asked = dict(zip([job.label for job in mixed.jobs], report_data.questions(mixed.jobs), strict=True))
    assert asked["five, seed 0"] == asked["five, seed 1"] and len(set(asked.values())) == 5
    job = mixed.first("five")
    twin = replace(job, row="twin", recipe=replace(job.recipe, method=replace(job.recipe.method, name="sskt")))
    other = replace(job, row="other", recipe=replace(job.recipe, data=replace(job.recipe.data, labels="/runs/other")))
    first, same, different = report_data.questions([job, twin, other])
    assert first == same != different
    puzzle = mixed.first("jigsaw")
    plain = replace(puzzle.recipe, pretext=replace(puzzle.recipe.pretext, replaced=0))
    one, two = report_data.questions([puzzle, replace(puzzle, row="plain", recipe=plain)])
    assert one != two
    labels = mixed.first("scratch")
    elsewhere = replace(labels.recipe, data=replace(labels.recipe.data, name="stl10"))
    assert len(set(report_data.questions([labels, replace(labels, row="stl10", recipe=elsewhere)]))) == 1


def test_what_cannot_be_made_is_a_sentence(mixed):
    puzzle, labels = mixed.first("jigsaw").folder, mixed.first("jigsaw").folder / "clusters"
    selected = puzzle / "checkpoints" / "selected.pt"
    labels.rename(labels.with_name("away"))
    try:
        page = mixed.again()
    finally:
        labels.with_name("away").rename(labels)
    assert "Not shown: data.labels: " in section(page, "Clusters: five") and "Grad-CAM" in shown_in(page)
    assert "<h2>What the networks look at: five" not in page and "puzzles" in shown_in(page)
    selected.rename(selected.with_suffix(".away"))
    try:
        page = mixed.again()
    finally:
        selected.with_suffix(".away").rename(selected)
    said = section(page, "Puzzles: jigsaw")
    assert re.search(r"No puzzles: .*no checkpoints/selected.pt\.</p>", said) and shown_in(said) == []


def test_clusters_without_their_distances_are_a_sentence(mixed, monkeypatch):
    def lost(recipe):
        raise OSError("the disk is gone")

    monkeypatch.setattr(pictures, "read_labels", lost)
    page = mixed.again()
    assert section(page, "Clusters: five") == "\n<p>Not shown: the disk is gone.</p>\n"
    assert shown_in(section(page, "What the networks look at: five")) == ["Grad-CAM"]


# pictures


def test_the_puzzles_are_those_of_the_evaluation(mixed):
    job = mixed.first("jigsaw")
    parts = build(job.recipe)
    solved = pictures.puzzles(job.recipe, str(job.folder), parts.dataset)
    batch = next(iter(parts.loaders["test"]))
    assert len(solved) == 4
    state = torch.load(job.folder / "checkpoints" / "selected.pt", weights_only=True)["target"]
    parts.target.load_state_dict(state)
    mean, std = (torch.tensor(v) for v in (job.recipe.data.mean, job.recipe.data.std))
    with torch.no_grad():
        share_BK = parts.target.eval()(network_input(batch.pixels, mean, std)).logits_BK.softmax(1)
    for b, puzzle in enumerate(solved):
        side = batch.pixels.shape[-1]
        step = (puzzle.puzzle_HW3.shape[0] - side) // 2
        assert puzzle.puzzle_HW3.shape == (2 * step + side,) * 2 + (3,) and step > side
        for place in range(9):
            top, left = place // 3 * step, place % 3 * step
            tile_TT3 = puzzle.puzzle_HW3[top : top + side, left : left + side]
            assert np.array_equal(tile_TT3, batch.pixels[b, :, place].permute(1, 2, 0).numpy())
        assert (puzzle.puzzle_HW3[side:step] == 255).all()
        right = bool(share_BK[b].argmax() == batch.targets[b])
        assert (
            puzzle.right == right and puzzle.said == f"{'right' if right else 'wrong'}, {100 * share_BK[b].max():.0f} %"
        )
        whole = open_data(with_given_labels(job.recipe)).read(int(batch.index[b]))
        assert puzzle.picture_HW3.shape == (36, 36, 3)
        assert abs(puzzle.picture_HW3.mean() - whole.mean()) < 4


def test_the_images_of_a_cluster_are_the_nearest_of_the_training(mixed, monkeypatch):
    """Distances and labels are made up: cluster 1 is the larger one, and its nearest images come last."""
    recipe = mixed.first("five").recipe
    dataset = open_data(with_given_labels(recipe))
    train_N = build(recipe).train_spec.index_N
    assert len(train_N) == 40
    label_N, distance2_N = np.full(len(dataset), 3), np.zeros(len(dataset), dtype=np.float32)
    label_N[train_N] = np.where(np.arange(40) < 28, 1, 4)
    distance2_N[train_N] = np.arange(40, 0, -1)
    made = PseudoLabels(label_N, distance2_N, 5, Path())
    monkeypatch.setattr(pictures, "read_labels", lambda recipe: made)
    one, four = pictures.clusters(recipe)
    for cluster, number, its in ((one, 1, train_N[:28]), (four, 4, train_N[28:])):
        count_K = np.bincount(dataset.targets_N[its], minlength=3)
        share, most = 100 * count_K.max() / len(its), dataset.classes[int(count_K.argmax())]
        assert cluster.title == f"cluster {number}: {len(its)} images, {share:.0f} % {most}"
        plain = with_given_labels(recipe)
        wanted_BHW3 = saliency.as_evaluated(plain, dataset, its[: -pictures.NEAREST - 1 : -1]).pixels.permute(
            0, 2, 3, 1
        )
        step = (cluster.strip_HW3.shape[1] - 36) // (pictures.NEAREST - 1)
        for i, picture_HW3 in enumerate(wanted_BHW3.numpy()):
            assert np.array_equal(cluster.strip_HW3[:, i * step : i * step + 36], picture_HW3)


def test_clusters_are_taken_evenly_by_size():
    count_K = np.array([9, 0, 30, 8, 8, 12, 7, 100, 11, 10, 9, 40])
    assert pictures.chosen_clusters(count_K) == [7, 11, 5, 8, 9, 0, 3, 4]
    assert pictures.chosen_clusters(np.array([9, 0, 2, 1])) == [0, 2, 3]  # blanks stand for what is not there
    many = np.arange(1000)[::-1]
    assert pictures.chosen_clusters(many) == [0, 142, 283, 425, 566, 708, 849, 991]


def test_a_picture_has_a_line_a_cluster(mixed):
    shown = pictures.clusters(mixed.first("six").recipe)
    made = read_labels(mixed.first("six").recipe)
    assert 1 <= len(shown) <= made.count == 6
    sizes = [int(re.search(r": (\d+) images", cluster.title).group(1)) for cluster in shown]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) <= 40
    data = re.search(r"base64,([^\"]*)", figures.clusters(shown)).group(1)
    width, height = Image.open(io.BytesIO(base64.b64decode(data))).size
    assert width > 400 and height > 60 * len(shown)


def test_the_map_of_a_source_of_clusters_is_of_its_stage(mixed):
    """Without scaling, the logit of cluster k is ``(2 f.c_k - |c_k|^2) / s`` with f the mean of the map A, so its Grad-CAM is
    ``ReLU(sum_c 2 c_kc A_c) / (s * places)``."""
    job = mixed.first("jigsaw")
    recipe = replace(job.recipe, pretext=replace(job.recipe.pretext, task="none", unit_length=False))
    found = make_centroids(str(job.folder), recipe, lambda line: None)
    source = Source(name="near", model="clusters", weights=str(job.folder), classes=5, size=36)
    network = saliency.open_clusters(source, recipe)
    x = torch.randn(2, 3, 36, 36)
    map_, (feature_BD,) = network.network.features.backbone, network.network.features(x)
    seen = []
    handle = map_.register_forward_hook(lambda module, given, made: seen.append(made[1]))
    logits_BK = network.network(x)
    handle.remove()
    nearest_B = torch.cdist(feature_BD, found.centroid_KD).argmin(1)
    scale = recipe.pretext.softness * found.mean_distance2
    slope_BC = 2 * found.centroid_KD[nearest_B] / (scale * seen[0][0, 0].numel())
    wanted = torch.einsum("bc,bchw->bhw", slope_BC, seen[0]).relu()
    its = saliency._of_clusters(network.network, x)
    assert torch.equal(its.class_B, nearest_B) and torch.allclose(its.logits_BK, logits_BK)
    assert wanted.max() > 0 and torch.allclose(its.cam, wanted, rtol=1e-3, atol=1e-6)
    dataset = open_data(mixed.first("scratch").recipe)
    column = saliency.source_column(source, recipe, dataset, saliency.chosen_samples(dataset))
    assert all(text.startswith("cluster ") for text in column.said) and column.cam_BHW.shape[1:] == (36, 36)


def test_a_source_that_was_trained_here_names_its_own_classes(mixed):
    """Clusters, whatever the data set's classes are called and however few there are."""
    dataset = open_data(mixed.first("scratch").recipe)
    job = mixed.first("seven")
    source = Source(name="s", model="fasttrain", weights=str(job.folder), classes=7, size=36)
    column = saliency.source_column(source, mixed.first("scratch").recipe, dataset, saliency.chosen_samples(dataset))
    assert all(re.match(r"cluster [0-6] \d", text) for text in column.said)


# linear probes


def probed(first: float, **changes) -> dict:
    """What `fasttrain probe` writes."""
    rows = [
        {"layer": layer, "name": name, "features": 8, "test": {"accuracy": first + layer}, "random": {"accuracy": 40.5}}
        for layer, name in ((1, "stage 1"), (2, "stage 2"), (0, "pooled"))
    ]
    return {"metric": "accuracy", "data": "toy", "labelled": 40, "chance": 33.75, "rows": rows} | changes


def test_probes_stand_stage_by_stage(mixed):
    assert "Linear probes" not in mixed.page
    paths = [mixed.first(row).folder / "probe.json" for row in ("jigsaw", "five", "six", "scratch")]
    contents = [probed(50), probed(60), probed(70, labelled=9), "no JSON"]
    try:
        for path, content in zip(paths, contents, strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        page = section(mixed.again(), "Linear probes")
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    assert shown_in(page) == ["linear probes"] * 2  # 9 labels are another question than 40
    assert "learned from 40 labelled images" in page and "learned from 9 labelled images" in page
    assert (
        "<tr><th><th>stage 1<th>stage 2<th>pooled<tr><td>jigsaw<td>51.00<td>52.00<td>50.00<tr><td>jigsaw: random"
        in page
    )
    assert "<td>five<td>61.00" in page and "<td>five: random weights<td>40.50" in page
    assert "Always giving the same answer reaches 33.75 %" in page
    assert re.search(r"Not shown: .*scratch.*probe.json is not what `fasttrain probe` writes", page)


def test_probes_that_lack_a_field_are_refused(tmp_path):
    assert pictures.read_probe(tmp_path) is None
    (tmp_path / "probe.json").write_text(json.dumps({"metric": "accuracy", "rows": [{"layer": 1}]}))
    with pytest.raises(ValueError, match="is not what `fasttrain probe` writes"):
        pictures.read_probe(tmp_path)
