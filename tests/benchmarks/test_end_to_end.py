"""Suite ``end-to-end`` on networks and images that take no time, and its arithmetic."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain.benchmarks import end_to_end, end_to_end_rows
from fasttrain.benchmarks.end_to_end import goals, limiter, rows, several_times
from fasttrain.loaders import open_dataset
from fasttrain.loaders.datasets.folder import image_folder
from fasttrain.loaders.pack import pack
from fasttrain.loaders.pack_video import pack_videos

from tests.loaders.videos import write

from .test_step_bench import few_photographs

SMALL = ["--target", "resnet20", "--models", "test_resnet,test_resnet", "--source-size", "32", "--batch", "8"]
SMALL += ["--compile", "false", "--images", "16", "--repeats", "1", "--turn", "0.05"]


class Here:
    """In the place of a row's process: the row in this one."""

    def __init__(self, name: str, asked: dict) -> None:
        self.row = end_to_end_rows.opened(name, asked)

    def started(self, seconds: float | None) -> str:
        return ""

    def work(self, seconds: float, epoch: int | None, *, within: float) -> float:
        answer = end_to_end_rows.turn(self.row, seconds, epoch, torch.device("cpu"))
        self.shares = answer["shares"]
        return answer["images"] / answer["seconds"]

    def end(self) -> None:
        for loader in self.row.parts.loaders.values():
            loader.close()
        if isinstance(self.row, end_to_end_rows.Training):
            self.row.trainer.writer.close()
            self.row.trainer.log.close()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A packed file of 48."""
    folder = tmp_path_factory.mktemp("photographs")
    few_photographs(folder / "files")
    pack(image_folder(folder / "files", val_share=0.1), folder / "packed.beton", seek=False)
    return folder / "packed.beton"


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(end_to_end, "Process", Here)


def test_every_training_stands_beside_its_two_floors(here, photographs, capsys):
    """Live sources are in the floor of live ones, and labels are looked up in the other's; at both ends of growing images."""
    asked = ["--data", str(photographs), "--sets", "progressive", "--grow", "24,32", "--loader", "torch"]
    content = end_to_end.run([*SMALL, *asked])
    assert content["not_run"] == {} and content["budget"] is None
    every = {(row["at"], row["name"]): row for row in content["rows"]}
    assert len(every) == len(content["rows"]) == 2 * 5 and {at for at, _ in every} == {"24 px", "32 px"}
    for (at, name), row in every.items():
        assert row["images_per_s"] > 0 and len(row["repeats"]) == 1 and row["loader"] == "torch"
        if name.startswith("train"):
            floors = [every[at, name.replace("train", "synthetic data")], every[at, "loader alone"]]
            assert row["share"] == row["images_per_s"] / min(floor["images_per_s"] for floor in floors)
            assert row["relative_to"].keys() == {floor["name"] for floor in floors} and row["limiter"]
    for at in ("24 px", "32 px"):
        live, recalled = (every[at, f"synthetic data, {kind}"]["shares"] for kind in ("live", "recalled"))
        assert live["sources"] > recalled["sources"] and live["data"] < 20
    assert [goal["met"] for goal in content["goals"]] == [None] * 4
    said = capsys.readouterr().out
    assert "train, recalled" in said and "not judged: no GPU" in said


def test_clips(here, tmp_path):
    lines = ["path,label,split"]
    for k, split in enumerate([*["train"] * 4, "val", "test"]):
        write(tmp_path / f"{k}.avi", "mpeg4", count=10, options={"g": "12", "bf": "0"})
        lines.append(f"{k}.avi,{'ab'[k % 2]},{split}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    pack_videos(open_dataset("videos", tmp_path / "list.csv"), tmp_path / "clips.beton", short_side=40, seek=False)
    asked = ["--video", str(tmp_path / "clips.beton"), "--sets", "clips", "--clip-size", "16", "--frames", "2"]
    content = end_to_end.run([*SMALL, *asked, "--clip-batch", "2"])
    assert content["not_run"] == {} and len(content["rows"]) == 5
    assert {(row["set"], row["at"], row["loader"]) for row in content["rows"]} == {("clips", "16 px", "video")}
    assert all(row["clips_per_s"] > 0 for row in content["rows"])
    assert [goal["goal"] for goal in content["goals"]] == [0.95] * 2


def test_what_a_budget_has_no_time_for_is_named(here, photographs):
    content = end_to_end.run([*SMALL, "--data", str(photographs), "--sets", "images", "--budget", "5"])
    assert content["rows"] == [] and content["budget"] == 5
    assert content["not_run"].keys() == {f"images, auto: {name}" for name in end_to_end_rows.KINDS}
    assert set(content["not_run"].values()) == {"the 5 s of --budget were over"}
    assert content["auto"]["images"].startswith(("ffcv (", "torch ("))


def test_a_rows_process_works_when_asked_and_leaves(photographs, tmp_path):
    """The real process, of the cheapest row; and one that cannot run says why."""
    given = end_to_end._parsed([*SMALL, "--data", str(photographs), "--sets", "images", "--size", "24"])
    (its,) = end_to_end._sets(given, tmp_path, {})
    row = end_to_end_rows.Process("loader alone", its.asked | {"serves": "torch"})
    wrong = end_to_end_rows.Process("loader alone", its.asked | {"serves": "quick"})
    assert row.started() == "" and row.work(0.01, None, within=60) > 0 and row.shares == {"data": 100.0}
    assert "quick" in wrong.started()
    with pytest.raises(ValueError, match="its process ended with 0"):
        wrong.work(1, None, within=60)
    row.end()
    wrong.end()


SHARES = {"data": 1.0, "sources": 60.0, "target": 39.0}


@pytest.mark.parametrize(
    ("synthetic", "loader", "data", "said"),
    [
        (100.0, 300.0, 1.0, "step (sources)"),
        (300.0, 100.0, 60.0, "loader"),
        (100.0, 104.0, 1.0, "loader and step (sources)"),
        (300.0, 100.0, 2.0, "unclear: the loader by its floor, but only 2.0 % of the time waits for data"),
        (100.0, 300.0, 30.0, "unclear: the step by its floor, but 30.0 % of the time waits for data"),
    ],
)
def test_the_limiter_is_the_slower_floor_if_the_trainings_own_time_agrees(synthetic, loader, data, said):
    assert limiter(synthetic, loader, SHARES | {"data": data}) == said


def test_a_share_is_that_of_the_slower_floor_and_medians_count():
    speeds = {"loader alone": [390.0, 400.0, 900.0], "train, live": [90.0, 95.0, 96.0], "synthetic data, live": [100.0]}
    speeds |= {"train, recalled": [300.0], "synthetic data, recalled": [500.0]}
    found = rows(
        speeds, dict.fromkeys(speeds, SHARES), {"set": "images", "at": "224 px", "loader": "ffcv"}, "images_per_s"
    )
    its = {row["name"]: row for row in found}
    assert its["train, live"]["share"] == 0.95 and its["train, recalled"]["share"] == 0.75
    assert its["train, live"]["relative_to"] == {"synthetic data, live": 0.95, "loader alone": 95 / 400}
    assert "share" not in its["loader alone"] and its["synthetic data, live"]["relative_to"] == {}


def test_goals_are_judged_only_where_a_gpu_ran():
    where = {"set": "images", "at": "224 px", "loader": "dali"}
    found = [{"name": "loader alone", **where, "images_per_s": 12_000.0}]
    found += [{"name": "loader alone", **where, "loader": "ffcv", "images_per_s": 9_000.0}]
    found += [{"name": "train, live", **where, "share": 0.98, "images_per_s": 1.0}]
    found += [
        {"name": "train, live", "set": "clips", "at": "112 px", "loader": "video", "share": 0.94, "clips_per_s": 1.0}
    ]
    assert [(g["goal"], g["found"], g["met"]) for g in goals(found, "cuda", 224)] == [
        (0.97, 0.98, True),
        (0.95, 0.94, False),
        (10_000.0, 12_000.0, True),
    ]
    assert [g["met"] for g in goals(found, "cpu", 224)] == [None] * 3
    assert len(goals(found, "cuda", 160)) == 2


def test_a_small_file_is_packed_several_times(photographs, tmp_path):
    once = open_dataset("beton", photographs)
    train_N = once.splits["train"]
    pack(several_times(once, 2 * len(train_N) + 3), tmp_path / "more.beton", seek=False)
    more = open_dataset("beton", tmp_path / "more.beton")
    assert [len(more.splits[split]) for split in ("train", "val", "test")] == [
        2 * len(train_N) + 3,
        len(once.splits["val"]),
        len(once.splits["test"]),
    ]
    n = len(train_N)
    for at, of in ((0, 0), (n, 0), (2 * n + 2, 2)):
        assert np.array_equal(more.read(int(more.splits["train"][at])), once.read(int(train_N[of])))
        assert more.targets_N[more.splits["train"][at]] == once.targets_N[train_N[of]]
    for split in ("val", "test"):
        assert np.array_equal(more.targets_N[more.splits[split]], once.targets_N[once.splits[split]])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--sets", "sounds"], "there is no set 'sounds'"),
        (["--grow", "192,160"], "are not two sides"),
        (["--turn", "0"], "--turn, --budget and numbers of clips must be above 0"),
        (["--images", "3"], "fewer --images than --batch"),
    ],
)
def test_mistakes(given, said):
    with pytest.raises(ValueError, match=f"bench end-to-end: .*{said}"):
        end_to_end.run(given)
