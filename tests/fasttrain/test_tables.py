"""The paper's tables: what is in them, their recipes, and every row of them run small."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from fasttrain.loaders.tiny import write_tiny

from fasttrain.recipe import from_dict, load, row
from fasttrain.tables import output
from fasttrain.tables.definition import TITLES, Entry, Row, rows, table
from fasttrain.tables.recipes import CLASSES, Place, recipe_of
from tests.fasttrain.test_command_line import refused

ALL = rows(list(TITLES))
# table -> the rows to train there, so that together they are all of them, each once
SMOKE = {
    "2": "*",
    "3": "*",
    "4": "*",
    "5": "*",
    "6": "mobilenet,densenet",
    "7": "*",
    "8": "*/kd,dml",
    "fig4": "*-T?-a*,stl10/resnet20/sskt-PI-ce,voc/resnet18/sskt-PI-ce",
}


def place(tmp_path, data: bool = True) -> Place:
    return Place(tmp_path / "runs", tmp_path / "data" if data else None, tmp_path / "weights")


def printed(name: str, id_: str) -> tuple[float | None, float | None]:
    [entry] = [e for e in table(name) if e.row.id == id_]
    return entry.mean, entry.std


def test_the_tables_are_the_papers():
    counts = {"2": 28, "3": 8, "4": 12, "5": 8, "6": 6, "7": 12, "8": 35, "fig4": 36}
    assert {name: len(table(name)) for name in TITLES} == counts
    assert len(ALL) == len({r.id for r in ALL}) == 132
    assert printed("2", "cifar10/resnet20/sskt-PI-kd") == (92.46, 0.15)
    assert printed("2", "stl10/resnet44/sskt-PI-TM-ce") == (83.44, 0.15)
    assert printed("3", "imagenet/resnet18/sskt-PI-ce") == (70.57, None)
    assert printed("4", "voc/resnet50/sskt-I-TM-ce") == (74.24, 0.05)
    assert printed("5", "hmdb51/resnet3d18/sskt-I-TM-kd") == (18.77, None)
    assert printed("6", "stl10/densenet121/sskt-PI-ce") == (77.03, 0.17)
    assert printed("7", "ucf101/resnet3d18/finetune") == (83.95, None)
    assert printed("8", "cifar100/resnet32/dml") == (71.9, 0.03)
    assert printed("8", "hmdb51/resnet3d18/sskt-PI-TM-ce") == (17.91, None)  # 20.54 in Table 5
    assert sum(e.mean for n in TITLES for e in table(n) if e.mean) == pytest.approx(7831.63)


def test_shared_rows_are_one():
    assert table("6")[0].row == table("2")[16].row
    assert sum(e.mean is not None for e in table("fig4")) == 2
    assert printed("fig4", "stl10/resnet20/sskt-PI-TM-ce") == (84.56, 0.35)
    of_8 = {e.row for e in table("8") if e.row.method == "sskt"}
    assert len(of_8) == 13 and of_8 <= {e.row for n in ("2", "4", "5", "7") for e in table(n)}
    assert {r.teacher for r in ALL if r.teacher} == {r for r in ALL if r.method == "teacher"}


def test_rows_become_complete_recipes(tmp_path):
    for experiment in ALL:
        made = recipe_of(experiment, place(tmp_path), seed=1)
        assert (made.target.model, made.run.seed) == (experiment.model, 1)
        assert len(made.chosen_sources()) == (len(experiment.sources) or (experiment.method == "kd"))
        assert made.data.views in (0, made.optim.epochs) or experiment.method == "teacher"
    for id_ in ("stl10/resnet20/sskt-PI-TM-ce-T2-a0.5", "voc/resnet18/kd", "hmdb51/resnet3d18/finetune-dml"):
        made = recipe_of(next(r for r in ALL if r.id == id_), place(tmp_path))
        assert from_dict(asdict(made)) == made  # of the types that the fields have
    cifar = recipe_of(next(r for r in ALL if r.id == "cifar10/resnet32/sskt-I-ce"), place(tmp_path))
    assert (cifar.optim.epochs, cifar.optim.milestones, cifar.optim.gamma) == (350, [150, 250, 350], 0.2)
    assert (cifar.transfer.temperature, cifar.transfer.alpha, cifar.transfer.every_view) == (1, 1, True)


def test_classes_are_those_of_the_data_sets():
    assert set(CLASSES) == {r.data for r in ALL}


@pytest.mark.parametrize("name", ["ucf101", "hmdb51", "ucf101-finetune", "hmdb51-finetune"])
def test_packaged_recipes_agree(name, tmp_path):
    packaged = load(name)
    of = {e.row.id: e.row for n in ("5", "7") for e in table(n)}
    start = f"{packaged.data.name}/resnet3d18/" + ("finetune" if name.endswith("finetune") else "scratch")
    for title, changes in packaged.rows.items():
        its = row(packaged, changes)
        letters = "".join({"places": "P", "imagenet": "I"}[s.name] for s in its.chosen_sources())
        tail = "-".join(["sskt", letters, *(["TM"] if its.transfer.module else []), its.transfer.loss])
        base = start if start.endswith("finetune") else start.removesuffix("/scratch")
        id_ = start if not letters else base + ("-" if base == start else "/") + tail
        made = recipe_of(of.pop(id_), Place(Path("runs"), None, None))
        same = replace(made, name=name, data=replace(made.data, root=None, views=0))
        if its.method.name == "scratch":  # then nothing is said of the sources' ways
            same = replace(same, sources=its.sources, transfer=its.transfer)
        its = replace(its, transfer=replace(its.transfer, sources=same.transfer.sources), run=same.run, name=name)
        assert same == its, title
    assert not [
        id_ for id_ in of if id_.startswith(packaged.data.name) and ("finetune" in id_) == ("finetune" in start)
    ]


def test_every_row_is_in_one_smoke_test(fasttrain):
    from fasttrain.tables.run import _matching

    chosen = [r for name, patterns in SMOKE.items() for r in _matching(patterns, rows([name]))]
    assert sorted(r.id for r in chosen) == sorted(r.id for r in ALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_every_row_runs(name, fasttrain, tmp_path):
    done = fasttrain("table", name, "--budget", "smoke", "--rows", SMOKE[name])
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "runs/tables/smoke"
    stem = "SMOKE-fig4" if name == "fig4" else f"SMOKE-table{name}"
    content = json.loads((root / f"{stem}.json").read_text())
    chosen = {r["id"] for r in content["rows"] if r["state"] == "done"}
    assert len(chosen) == {"2": 28, "3": 8, "4": 12, "5": 8, "6": 4, "7": 12, "8": 26, "fig4": 34}[name]
    assert content["title"].startswith("SMOKE") and "SMOKE" in (root / f"{stem}.md").read_text()
    assert all(r["difference"] is None for r in content["rows"])
    assert (root / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert [p for p in (tmp_path / "runs/tables").iterdir() if p.name != "smoke" and not p.name.startswith(".")] == []
    assert {p.parent.parent.parent.name for p in root.rglob("checkpoints/*.pt")} <= {"teacher"}
    for id_ in chosen:
        its = yaml.safe_load((root / id_ / "seed0/recipe.yaml").read_text())
        assert its["optim"]["epochs"] == 1
    if name == "8":
        assert "source teacher: fasttrain" in done.stdout and "peer1: timm:test_resnet" in done.stdout


@pytest.fixture
def stl10(tmp_path) -> tuple[str, ...]:
    """Options for short runs on tiny data in the official format; no weights of Places365."""
    write_tiny("stl10", tmp_path / "D/stl10", samples=6)
    small = {"optim.epochs": 1, "data.verify": "false", "data.size": 24, "data.batch": 16, "run.tensorboard": "false"}
    return ("--data-root", "D", *(text for k, v in small.items() for text in (f"--{k}", str(v))))


def test_what_is_missing_is_said_and_the_rest_runs(fasttrain, tmp_path, stl10):
    asked = ("--rows", "resnet20", "--seeds", "2", *stl10)
    done = fasttrain("table", "6", *asked)
    assert done.returncode == 1, done.stderr
    why = "no weights: there is no D/weights/resnet50_places365.pth.tar"
    assert f"not run: {why}: stl10/resnet20/sskt-PI-TM-ce" in done.stdout and "1 of 2 rows are not done" in done.stdout
    content = json.loads((tmp_path / "runs/tables/table6.json").read_text())
    of = {r["id"]: r for r in content["rows"]}
    seeds = [tmp_path / f"runs/tables/stl10/resnet20/scratch/seed{k}/summary.json" for k in (0, 1)]
    figures = [json.loads(path.read_text())["test"]["accuracy"] for path in seeds]
    mine = of["stl10/resnet20/scratch"]
    assert mine["ours"]["mean"] == pytest.approx(sum(figures) / 2)
    assert mine["difference"] == pytest.approx(sum(figures) / 2 - 81.15) and mine["seeds"] == 2
    assert of["stl10/resnet20/sskt-PI-TM-ce"]["state"] == f"not run: {why}"
    assert of["stl10/mobilenet_v2/scratch"]["state"] == "to run"
    before = [path.stat().st_mtime_ns for path in seeds]

    # the same row of another table is done; a listing trains nothing and ends well
    listed = fasttrain("table", "2", "--list", *asked)
    assert listed.returncode == 0 and not (tmp_path / "runs/tables/table2.md").exists()
    [line] = [line for line in listed.stdout.splitlines() if line.split()[:1] == ["stl10/resnet20/scratch"]]
    assert line.split()[-1] == "done"
    one = ("--rows", "stl10/resnet20/scratch", *stl10)
    again = fasttrain("table", "2", "--seeds", "2", *one)
    assert again.returncode == 0 and [path.stat().st_mtime_ns for path in seeds] == before
    third = fasttrain("table", "2", "--list", *one)
    assert "2 of 3 seeds done, to run" in third.stdout

    # what was made with other fields is no result of these
    other = fasttrain("table", "2", *one, "--optim.lr", "0.3")
    assert other.returncode == 1
    assert "holds a run with optim.lr 0.1, and this one has 0.3: choose another --dir" in other.stdout


def test_a_row_that_fails_does_not_end_the_others(fasttrain, tmp_path, stl10):
    (tmp_path / "D/weights").mkdir()
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, tmp_path / "D/weights/resnet50_places365.pth.tar")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "D/weights/resnet50-0676ba61.pth")
    patterns = "stl10/resnet20/scratch,stl10/resnet20/kd,stl10/resnet20/sskt-P-TM-ce"
    done = fasttrain("table", "all", "--rows", patterns, "--seeds", "1", *stl10)
    assert done.returncode == 1
    assert "resnet50_places365.pth.tar do not fit torchvision:resnet50" in done.stdout
    assert "its teacher stl10/resnet50/teacher: target.weights:" in done.stdout and "stl10/resnet20/kd" in done.stdout
    assert json.loads((tmp_path / "runs/tables/table2.json").read_text())["rows"][16]["state"] == "done"
    assert not (tmp_path / "runs/tables/stl10/resnet50").exists()


def test_rows_side_by_side_and_the_papers_protocol(fasttrain, tmp_path):
    patterns = "stl10/resnet20/scratch,stl10/resnet20/sskt-P-TM-ce"
    done = fasttrain("table", "2", "--budget", "smoke", "--protocol", "paper", "--rows", patterns, "--parallel", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "runs/tables/smoke/protocol-paper"
    assert "PROTOCOL paper" in (root / "SMOKE-table2.md").read_text()
    its = json.loads((root / "stl10/resnet20/scratch/seed0/summary.json").read_text())
    assert its["val"] == its["test"]  # selected on the test split


def test_a_teacher_sees_what_its_row_was_trained_on(tmp_path):
    kd = Row("stl10", "resnet20", "kd")
    made = recipe_of(kd, place(tmp_path), seed=2)
    [source] = made.chosen_sources()
    assert source.weights == str(tmp_path / "runs/stl10/resnet50/teacher/seed0")
    teacher = recipe_of(kd.teacher, place(tmp_path))
    assert (source.size, source.classes, teacher.data.size) == (224, 10, 224)
    assert (source.mean, source.std) == (teacher.data.mean, teacher.data.std)


def test_packed_data_and_fetched_weights_are_taken_where_they_lie(tmp_path):
    here = place(tmp_path)
    voc = next(r for r in ALL if r.id == "voc/resnet18/finetune-sskt-I-kd")
    assert recipe_of(voc, here).target.weights == "IMAGENET1K_V1"
    assert here.missing(voc).startswith("no data: there is neither")
    for name in ("data/voc.beton", "weights/resnet18-f37072fd.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    made = recipe_of(voc, here)
    assert (made.data.name, made.data.root) == ("beton", str(tmp_path / "data/voc.beton"))
    assert made.target.weights == str(tmp_path / "weights/resnet18-f37072fd.pth") and here.missing(voc) == ""


def test_what_a_table_leaves(tmp_path):
    def summary(**test) -> dict:
        made = {"machine": {"cpu": "C", "gpu": []}, "commit": "abc", "versions": {"torch": "2"}}
        return {"test": test, "images_per_s": 10.0, "environment": made}

    one, two = Row("voc", "resnet18", "scratch"), Row("ucf101", "resnet3d18", "scratch")
    found = {one: [summary(sample_ap=70.0, map=60.0), summary(sample_ap=72.0, map=61.0)], two: []}
    states = {one: "done", two: "not run: no data"}
    about = {"budget": "full", "protocol": "validation", "changes": [], "command": "fasttrain table 4"}
    entries = [Entry(one, 67.28, 0.25), Entry(two, 43.28, None)]
    content = output.content_of("4", entries, found, states, about)
    first, second = content["rows"]
    assert first["ours"] == {"mean": 71.0, "std": pytest.approx(2**0.5)} and first["metric"] == "sample_ap"
    assert first["difference"] == pytest.approx(3.72) and first["others"]["map"]["mean"] == 60.5
    assert second["ours"] is None and second["difference"] is None
    paths = output.write(tmp_path, content)
    assert [p.name for p in paths] == ["table4.md", "table4.csv", "table4.json", "table4.png"]
    text = paths[0].read_text()
    assert "| voc/resnet18/scratch | 71.00 ± 1.41 | 67.28 ± 0.25 | +3.72 | 60.50 ± 0.71 |" in text
    assert "| ucf101/resnet3d18/scratch |  | 43.28 |  |" in text and "not run: no data" in text
    lines = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert (lines[0]["ours_mean"], lines[0]["map"], lines[1]["state"]) == ("71.0", "60.5", "not run: no data")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("9",), "there is no table '9'; there are 2, 3"),
        ((), "there is no table None"),
        (("all", "--data-root", "."), "--rows '*' if that is meant"),
        (("2",), "table needs --data-root DIR"),
        (("2", "--data-root", "nowhere"), "--data-root: there is no folder nowhere"),
        (("2", "--list", "--weights", "nowhere"), "--weights: there is no folder nowhere"),
        (("2", "--list", "--seeds", "0"), "--seeds: '0' is no whole number above 0"),
        (("2", "--list", "--budget", "tiny"), "--budget: 'tiny' is none of full, smoke"),
        (("2", "--list", "--rows", "stl10/resnet20/scretch"), "near are stl10/resnet20/scratch"),
        (("2", "--list", "--optim.lrr", "1"), "there is no field optim.lrr; did you mean optim.lr?"),
        (("2", "--list", "--optim.lr", "fast"), "optim.lr: expected float, got fast"),
        (("2", "--list", "--run.seeds", "5"), "--run.seeds: of a table, say --seeds"),
        (("2", "--list", "--data", "{size: 9}"), "--data is no single field"),
    ],
)
def test_mistakes_are_sentences(arguments, said, fasttrain, tmp_path):
    refused(fasttrain("table", *arguments), said)
    assert not (tmp_path / "runs").exists()


def test_help(fasttrain):
    assert "--data-root" in fasttrain("table", "-h").stdout
