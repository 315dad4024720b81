"""Data sets of videos as they lie on disk, what is said of damaged ones, and made-up motion. No video is decoded here."""

import csv
import os
import pickle
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fasttrain.loaders import Dataset, open_dataset
from fasttrain.loaders.datasets.base import split_off_groups
from fasttrain.loaders.datasets.hmdb51 import read_line as hmdb51_line
from fasttrain.loaders.datasets.hmdb51 import recording
from fasttrain.loaders.datasets.kinetics import read_list as kinetics_clips
from fasttrain.loaders.datasets.motion import MotionClips
from fasttrain.loaders.datasets.ucf101 import read_classes
from fasttrain.loaders.datasets.ucf101 import read_line as ucf101_line
from fasttrain.loaders.video import Clips
from fasttrain.loaders.video.files import VideoFiles
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

UCF = ("ApplyEyeMakeup", "HandstandPushups", "YoYo")
HMDB = ("brush_hair", "climb_stairs", "wave")
FILMS = ("#20_Rhythm", "(Rad)Schlag_die_Bank!", "Re-_Show_your_Smile!", "AT&T;[2] x", "winKen", "1", "21", "b_wave")


def files(folder: Path, names: list[str]) -> None:
    """Empty files, in an order of their own: what a folder lists first is not what was meant to be first."""
    for name in random.Random(len(names)).sample(names, len(names)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(dataset: Dataset, split: str | None = None) -> list[str]:
    index_N = range(len(dataset)) if split is None else dataset.splits[split].tolist()
    return [Path(dataset.read.name(i)).name for i in index_N]


def assert_sound(dataset: Dataset, *sizes: int) -> None:
    assert list(dataset.splits) == ["train", "val", "test"]
    assert tuple(map(len, dataset.splits.values())) == sizes
    together = np.concatenate(list(dataset.splits.values()))
    assert together.dtype == dataset.targets_N.dtype == np.int64
    assert sorted(together) == list(range(len(dataset)))
    assert all((np.diff(v) > 0).all() for v in dataset.splits.values())
    assert isinstance(dataset.read, Clips) and dataset.video


def result(call: Callable, *arguments) -> tuple[Any, str]:
    """What a call returns, and the message of the ValueError that it raises."""
    try:
        return call(*arguments), ""
    except ValueError as error:
        return None, str(error)


def refused(match: str, name: str, root: Path, **options) -> None:
    with pytest.raises(ValueError, match=match):
        open_dataset(name, root, **options)


# ucf101


def ucf_names(groups: range, clips: int = 3) -> list[str]:
    """Paths as the lists have them: the folder HandstandPushups holds files called HandStandPushups."""
    spelt = {"HandstandPushups": "HandStandPushups"}
    return [f"{c}/v_{spelt.get(c, c)}_g{g:02}_c{k + 1:02}.avi" for c in UCF for g in groups for k in range(clips)]


def ucf(
    root: Path, videos: str = "UCF-101", lists: str = "ucfTrainTestlist", end: str = "\r\n", mark: str = ""
) -> Path:
    """25 groups a class; split s tests those from 5 s - 4 on."""
    files(root / videos, ucf_names(range(1, 26)))
    (root / lists).mkdir(parents=True, exist_ok=True)
    number = {c: i + 1 for i, c in enumerate(UCF)}
    (root / lists / "classInd.txt").write_bytes(
        end.join([mark + "1 ApplyEyeMakeup", "2 HandStandPushups", "3 YoYo", ""]).encode()
    )
    for s in (1, 2, 3):
        tests = ucf_names(range(5 * s - 4, 5 * s + 1))
        trains = [n for n in ucf_names(range(1, 26)) if n not in tests]
        content = {"train": [f"{n} {number[n.split('/')[0]]}" for n in trains], "test": tests}
        for part, lines in content.items():
            (root / lists / f"{part}list{s:02}.txt").write_bytes((mark + end.join([*lines, ""])).encode())
    return root / lists


def group(name: str) -> tuple[str, str]:
    return tuple(name.split("_")[1:3])


@pytest.mark.parametrize("videos", [".", "UCF-101", "UCF101"])
@pytest.mark.parametrize("lists", [".", "ucfTrainTestlist", "UCF101TrainTestSplits-RecognitionTask/ucfTrainTestlist"])
def test_ucf101_layouts(tmp_path, videos, lists):
    ucf(tmp_path, videos, lists)
    dataset = open_dataset("ucf101", tmp_path, val_share=0.1)
    assert dataset.name == "ucf101" and dataset.classes == ("ApplyEyeMakeup", "HandStandPushups", "YoYo")
    assert_sound(dataset, 3 * 18 * 3, 3 * 2 * 3, 3 * 5 * 3)
    assert names(dataset) == [Path(n).name for n in ucf_names(range(1, 26))]
    assert dataset.targets_N.tolist() == [0] * 75 + [1] * 75 + [2] * 75
    assert all(Path(dataset.read.name(i)).is_file() for i in range(len(dataset)))
    assert dataset.source.endswith("split 1")


def test_ucf101_splits(tmp_path):
    ucf(tmp_path, end="\n", mark="\ufeff")
    datasets = [open_dataset("ucf101", tmp_path, split=s, val_share=0.2) for s in (1, 2, 3)]
    for s, dataset in enumerate(datasets, start=1):
        assert_sound(dataset, 3 * 16 * 3, 3 * 4 * 3, 3 * 5 * 3)
        groups = {k: {group(n) for n in names(dataset, k)} for k in dataset.splits}
        assert {g for _, g in groups["test"]} == {f"g{g:02}" for g in range(5 * s - 4, 5 * s + 1)}
        assert not groups["train"] & groups["val"] and not (groups["train"] | groups["val"]) & groups["test"]
        assert Counter(c for c, _ in groups["val"]) == dict.fromkeys(("ApplyEyeMakeup", "HandStandPushups", "YoYo"), 4)
    assert len({d.identity() for d in datasets}) == 3
    again = open_dataset("ucf101", tmp_path, split=2, val_share=0.2)
    assert again.identity() == datasets[1].identity() and names(again) == names(datasets[1])
    none = open_dataset("ucf101", tmp_path, val_share=0)
    assert_sound(none, 3 * 20 * 3, 0, 3 * 5 * 3)
    for split in (0, 4, -1):
        refused(
            rf"data\.split: {split} is not 1, 2 or 3, the official splits of ucf101", "ucf101", tmp_path, split=split
        )


def test_the_order_is_that_of_the_names(tmp_path, monkeypatch):
    """Whatever the order of the lists' lines and of what the file system says."""
    lists = ucf(tmp_path / "a")
    ucf(tmp_path / "b")
    before = open_dataset("ucf101", tmp_path / "a")
    for path in lists.glob("*list01.txt"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join(random.Random(0).sample(lines, len(lines))))
    real = os.scandir

    class Shuffled:
        def __init__(self, path):
            entries = sorted(real(path), key=lambda e: e.name, reverse=True)
            self.entries = entries

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("os.scandir", Shuffled)
    for root in ("a", "b"):
        after = open_dataset("ucf101", tmp_path / root)
        assert after.identity() == before.identity() and names(after) == names(before)


@pytest.mark.parametrize(
    ("file", "line", "match"),
    [
        ("trainlist01.txt", "YoYo/v_YoYo_g01_c09.avi 3", r"line 3: there is no file .*UCF-101.YoYo.v_.*_c09\.avi; 1 of 226"),
        ("trainlist01.txt", "YoYo/v_YoYo_g01_c01.avi 2", "line 3: YoYo has the number 3 in classInd.txt, not 2"),
        ("trainlist01.txt", "YoYo/v_YoYo_g01_c01.avi x", r"line 3: CLASS/NAME_gNN_cNN\.avi, .*, not 'YoYo/v_YoYo"),
        ("trainlist01.txt", "YoYo/v_YoYo_g06_c01.avi 3", r"trainlist01\.txt, line \d+: v_\w+.avi is there already, in .*line 3"),
        ("testlist01.txt", "YoYo/v_YoYo_g06_c01.avi", r"testlist01\.txt, line 3: v_\w+.avi is there already, in .*, for train"),
        ("testlist01.txt", "YoYo/v_yoyo_G06_c01.avi", r"testlist01\.txt, line 3: CLASS/NAME"),
        ("testlist01.txt", "YoYo/v_yoyo_g06_c01.AVI", r"testlist01\.txt, line 3: CLASS/NAME"),
        ("testlist01.txt", "YoYo/v_yoyo_g06_c01.avi", r"testlist01\.txt, line 3: v_\w+.avi is there already, in .*, for train"),
        ("testlist01.txt", "yoyo/v_YoYo_g06_c01.avi 3", r"testlist01\.txt, line 3: v_YoYo_g06_c01.avi is there already"),
        ("testlist01.txt", "Juggling/v_Juggling_g01_c01.avi", "line 3: the class Juggling is not in classInd"),
        ("testlist01.txt", "../v_YoYo_g01_c01.avi", r"line 3: the class \.\. is not in classInd"),
        ("testlist01.txt", "/v_YoYo_g01_c01.avi", "line 3: CLASS/NAME"),
        ("testlist01.txt", "YoYo/../YoYo/v_YoYo_g01_c01.avi", "line 3: CLASS/NAME"),
        ("testlist01.txt", "YoYo/v_YoYo.avi", "line 3: CLASS/NAME"),
        ("classInd.txt", "4 YoYo", r"classInd\.txt, line 4: 3 YoYo: this number or name is there already"),
        ("classInd.txt", "1 Rowing", r"classInd\.txt, line 3: 1 Rowing: this number or name is there already"),
        ("classInd.txt", "0 Rowing", r"classInd\.txt: classes are to be numbered 1, 2, \.\. without a gap; it has 4"),
        ("classInd.txt", "5 Rowing", r"classInd\.txt: classes are to be numbered 1, 2, \.\. without a gap; it has 4"),
        ("classInd.txt", "Rowing", r"classInd\.txt, line 3: a number and a class name are expected, not 'Rowing'"),
        ("classInd.txt", "4 Rowing", r"data\.root: split 1 in .*UCF-101 has no training videos of Rowing"),
    ],
)  # fmt: skip
def test_ucf101_lines_that_are_wrong(tmp_path, file, line, match):
    lists = ucf(tmp_path)
    lines = (lists / file).read_text().splitlines()
    (lists / file).write_text("\n".join([*lines[:2], line, *lines[2:]]))
    refused(match, "ucf101", tmp_path)


def test_ucf101_folders_that_are_wrong(tmp_path):
    refused(r"data\.root: there is no trainlist01\.txt in .*, nor in ucfTrainTestlist or UCF101", "ucf101", tmp_path)
    lists = ucf(tmp_path / "set")
    root = tmp_path / "set"
    (lists / "testlist02.txt").write_bytes(b"\xff\xfeY\0")
    refused(r"cannot read .*testlist02\.txt: .*utf-8", "ucf101", root, split=2)
    (lists / "testlist02.txt").unlink()
    refused(r"cannot read .*testlist02\.txt: No such file", "ucf101", root, split=2)
    (lists / "classInd.txt").rename(lists / "classes.txt")
    refused(r"cannot read .*classInd\.txt: No such file", "ucf101", root)
    (lists / "classInd.txt").write_text("")
    refused(r"classInd\.txt: classes are to be numbered 1, 2, \.\. without a gap; it has 0", "ucf101", root)
    (lists / "classInd.txt").unlink()
    (lists / "classes.txt").rename(lists / "classInd.txt")
    yoyo = root / "UCF-101/YoYo"
    yoyo.rename(tmp_path / "outside")
    refused(r"trainlist01\.txt, line \d+: there is no folder .*UCF-101.YoYo$", "ucf101", root)
    yoyo.symlink_to(tmp_path / "outside")
    refused(r"trainlist01\.txt, line \d+: YoYo leads out of .*UCF-101, to .*outside", "ucf101", root)
    yoyo.unlink()
    (tmp_path / "outside").rename(yoyo)
    last = yoyo / "v_YoYo_g25_c03.avi"
    last.rename(tmp_path / "outside.avi")
    last.symlink_to(tmp_path / "outside.avi")
    refused(r"trainlist01\.txt, line \d+: YoYo/v_YoYo_g25_c03\.avi leads out of .*, to .*outside\.avi", "ucf101", root)
    last.unlink()
    last.symlink_to("v_YoYo_g25_c02.avi")
    refused(r"line \d+: v_YoYo_g25_c03\.avi is there already, in .*line \d+", "ucf101", root)
    last.unlink()
    last.symlink_to(last.name)  # to itself
    refused(r"there is no file .*v_YoYo_g25_c03\.avi; 1 of 225 are missing", "ucf101", root)
    last.unlink()
    last.touch()
    (tmp_path / "alias").symlink_to(root)
    assert open_dataset("ucf101", tmp_path / "alias").identity() == open_dataset("ucf101", root).identity()


@given(st.text(max_size=40) | st.from_regex(r"(YoYo|yoyo|\.\.)?/v_\w{0,5}_g\d{1,2}_c\d{1,2}\.avi ?[0-4]?\n?"))
def test_ucf101_lines_are_refused_or_valid(text):
    entry, message = result(ucf101_line, text, "train", {"yoyo": 2}, "line 1")
    if entry is None:
        assert message.startswith("line 1: ")
        return
    assert text.startswith(f"{text[:4]}/{entry.file}") and text[:4].casefold() == "yoyo" and entry.label == 2
    assert "/" not in entry.file and entry.recording in entry.file and text[5 + len(entry.file) :].strip() in ("", "3")


@given(st.lists(st.text(max_size=12) | st.from_regex(r"[1-4] [A-D]", fullmatch=True), max_size=5))
def test_class_lists_are_refused_or_valid(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "classInd.txt"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass", newline="")
    classes, message = result(read_classes, path)
    if classes is None:
        assert str(path) in message
        return
    assert len(set(classes)) == len(classes) > 0 and all(c and not set(c) & set(" /\\\n") for c in classes)


# hmdb51


def hmdb_name(film: str, name: str, number: int) -> str:
    return f"{film}_{name}_u_nm_np1_ba_goo_{number}.avi"


def hmdb(root: Path, videos: str = "hmdb51_org", lists: str = "testTrainMulti_7030_splits") -> Path:
    """Eight films a class with five clips each: two to test, one that split 1 does not use, five to train."""
    (root / lists).mkdir(parents=True, exist_ok=True)
    for c in HMDB:
        files(root / videos / c, [hmdb_name(f, c, k) for f in FILMS for k in range(5)])
        for s in (1, 2, 3):
            use = {f: [2, 2, 0, 1, 1, 1, 1, 1][(i + s) % 8] for i, f in enumerate(FILMS)}
            lines = [f"{hmdb_name(f, c, k)} {use[f]} " for f in FILMS for k in range(5)]
            (root / lists / f"{c}_test_split{s}.txt").write_text("\n".join([*lines, ""]))
    return root / lists


@pytest.mark.parametrize("videos", [".", "hmdb51_org", "hmdb51"])
@pytest.mark.parametrize(
    "lists",
    [
        *(".", "testTrainMulti_7030_splits", "test_train_splits"),
        "test_train_splits/testTrainMulti_7030_splits",
    ],
)
def test_hmdb51_layouts(tmp_path, videos, lists):
    hmdb(tmp_path, videos, lists)
    dataset = open_dataset("hmdb51", tmp_path, split=3, val_share=0.2)
    assert dataset.name == "hmdb51" and dataset.classes == HMDB
    assert_sound(dataset, 3 * 4 * 5, 3 * 1 * 5, 3 * 2 * 5)
    films = {k: {(n.rsplit("_u_", 1)[0]) for n in names(dataset, k)} for k in dataset.splits}
    assert not films["train"] & films["val"] and not (films["train"] | films["val"]) & films["test"]
    kept = [f for i, f in enumerate(FILMS) if (i + 3) % 8 != 2]
    assert names(dataset) == [n for c in HMDB for n in sorted(hmdb_name(f, c, k) for f in kept for k in range(5))]
    assert all(Path(dataset.read.name(i)).is_file() for i in range(len(dataset)))
    assert dataset.identity() == open_dataset("hmdb51", tmp_path, split=3, val_share=0.2).identity()
    refused(r"data\.split: 0 is not 1, 2 or 3", "hmdb51", tmp_path, split=0)


def test_what_an_hmdb51_clip_was_cut_from():
    for file, name, expected in [
        ("April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "brush_hair", "April_09"),
        ("(Rad)Schlag_die_Bank!_cartwheel_f_cm_np1_le_med_0.avi", "cartwheel", "(Rad)Schlag_die_Bank!"),
        ("wave_on_wave_wave_l_cm_np2_fr_bad_11.avi", "wave", "wave_on_wave"),
        ("Return_of_the_King_4_sword_u_cm_np2_fr_med_7.avi", "sword", "Return_of_the_King_4"),
        ("Return_of_the_King_4_sword_exercise_u_cm_np2_fr_med_7.avi", "sword_exercise", "Return_of_the_King_4"),
        ("my own.avi", "wave", "my own.avi"),
        ("film_run_u_nm_np1_ba_goo_0.avi", "wave", "film_run_u_nm_np1_ba_goo_0.avi"),
    ]:
        assert recording(file, name) == expected


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("1_wave_u_nm_np1_ba_goo_9.avi 1", r"line 3: there is no file .*hmdb51_org.wave.1_wave_.*_9\.avi; 1 of 106 are missing"),
        ("1_wave_u_nm_np1_ba_goo_0.avi 1", r"wave_test_split1\.txt, line \d+: 1_wave.*_0\.avi is there already, in .*line 3"),
        ("21_wave_u_nm_np1_ba_goo_0.avi 2", r"wave_test_split1\.txt, line \d+: 21_wave.* already, in .*line 3, for test"),
        ("1_wave_u_nm_np1_ba_goo_0.avi 3", "line 3: a file's name that ends in .avi, and 0, 1 or 2, are expected, not '1_wave"),
        ("1_wave_u_nm_np1_ba_goo_0.avi", "line 3: a file's name"),
        ("../wave/1_wave_u_nm_np1_ba_goo_0.avi 1", "line 3: a file's name"),
        ("/1_wave_u_nm_np1_ba_goo_0.avi 1", "line 3: a file's name"),
        ("a\0b.avi 1", "line 3: a file's name"),
        ("... 1", "line 3: a file's name"),
    ],
)  # fmt: skip
def test_hmdb51_lines_that_are_wrong(tmp_path, line, match):
    path = hmdb(tmp_path) / "wave_test_split1.txt"
    lines = path.read_text().splitlines()
    path.write_text("\r\n".join(["\ufeff" + lines[0], lines[1], line, *lines[2:]]))
    refused(match, "hmdb51", tmp_path)


def test_hmdb51_folders_that_are_wrong(tmp_path):
    refused(r"data\.root: there is no CLASS_test_split1\.txt in .*, nor in testTrainMulti", "hmdb51", tmp_path)
    lists = hmdb(tmp_path)
    (lists / "wave_test_split1.txt").rename(lists / "kept")
    refused(r"hmdb51_org.wave holds videos, and there is no .*wave_test_split1\.txt", "hmdb51", tmp_path)
    (lists / "wave_test_split1.txt").write_bytes(b"\xe9.avi 1\n")
    refused(r"cannot read .*wave_test_split1\.txt: .*utf-8", "hmdb51", tmp_path)
    (lists / "wave_test_split1.txt").write_text((lists / "kept").read_text().replace(".avi 1", ".avi 0"))
    refused(r"data\.root: split 1 in .*hmdb51_org has no training videos of wave", "hmdb51", tmp_path)
    (lists / "kept").rename(lists / "wave_test_split1.txt")
    (tmp_path / "hmdb51_org/wave").rename(tmp_path / "outside")
    refused(r"line 1: there is no folder .*hmdb51_org.wave$", "hmdb51", tmp_path)
    (tmp_path / "hmdb51_org/wave.rar").touch()
    refused(r"line 1: there is no folder .*wave: unpack wave\.rar, which is there", "hmdb51", tmp_path)
    (tmp_path / "hmdb51_org/wave").symlink_to(tmp_path / "outside")
    refused(r"line 1: wave leads out of .*hmdb51_org, to .*outside", "hmdb51", tmp_path)


@given(st.text(max_size=40) | st.from_regex(r"[^\n]{0,9}\.avi [0-3] ?"))
def test_hmdb51_lines_are_refused_or_valid(text):
    entry, message = result(hmdb51_line, text, "wave", 3, "line 1")
    if message:
        assert message.startswith("line 1: ")
        return
    assert entry is None or (text.startswith(entry.file) and entry.file.endswith(".avi") and "/" not in entry.file)
    assert (text.strip()[-1:] == "0") == (entry is None) and (entry is None or entry.label == 3)


# kinetics


LABELS = ("air drumming", "massaging person's head", "shooting goal (soccer)")


def youtube(number: int) -> str:
    return f"-_{number:09x}"


def stem(number: int) -> str:
    return f"{youtube(number)}_{number:06}_{number + 10:06}"


def kinetics_list(path: Path, numbers: range, split: str, labelled: bool = True, mark: str = "") -> None:
    """Video n has the class n mod 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["label", "youtube_id", "time_start", "time_end", "split", "is_cc"]
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(mark)
        writer = csv.writer(file)
        writer.writerow(columns if labelled else columns[1:5])
        for n in numbers:
            row = [LABELS[n % 3], youtube(n), n, n + 10, split, 0]
            writer.writerow(row if labelled else row[1:5])


def labelled_folder(n: int) -> str:
    return f"{LABELS[n % 3]}/{stem(n)}.mp4"


PLACES = {
    "blanks": labelled_folder,
    "underscores": lambda n: f"{LABELS[n % 3].replace(' ', '_')}/{stem(n)}.{('mp4', 'mkv', 'webm', 'avi')[n % 4]}",
    "plain": lambda n: f"{LABELS[n % 3].replace(' ', '_').translate(dict.fromkeys(map(ord, '()')))}/{stem(n)}.MP4",
    "flat": lambda n: f"{stem(n)}.mp4",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("lists", "val"), [(".", "val"), ("annotations", "validate")])
def test_kinetics_layouts(tmp_path, place, lists, val):
    kinetics_list(tmp_path / lists / "train.csv", range(60), "train", mark="\ufeff")
    kinetics_list(tmp_path / lists / f"{val}.csv", range(60, 90), val)
    kinetics_list(tmp_path / lists / "test.csv", range(90, 99), "test", labelled=False)
    files(tmp_path / "train", [PLACES[place](n) for n in range(60)])
    files(tmp_path / val, [PLACES["flat"](n) for n in range(60, 90)])
    files(tmp_path / "test", [PLACES["flat"](n) for n in range(90, 99)])
    dataset = open_dataset("kinetics400", tmp_path, val_share=0.1)
    assert_sound(dataset, 54, 6, 30)
    assert dataset.classes == LABELS and dataset.source == str(tmp_path)
    expected = [n for first, end in ((0, 60), (60, 90)) for c in range(3) for n in range(first + c, end, 3)]
    assert [n.rpartition(".")[0] for n in names(dataset)] == [stem(n) for n in expected]
    assert dataset.targets_N.tolist() == [n % 3 for n in expected]
    assert all(Path(dataset.read.name(i)).is_file() for i in range(90))


def test_kinetics_with_a_labelled_test_split_and_replacements(tmp_path):
    for split, numbers in (("train", range(30)), ("val", range(30, 45)), ("test", range(45, 54))):
        kinetics_list(tmp_path / f"{split}.csv", numbers, split)
        files(tmp_path / split, [labelled_folder(n) for n in numbers])
    files(tmp_path / "replacement/replacement_for_corrupted_k400", [f"{stem(n)}.mp4" for n in (4, 50, 99)])
    dataset = open_dataset("kinetics400", tmp_path)
    assert_sound(dataset, 30, 15, 9)
    assert dataset.splits["test"].tolist() == list(range(45, 54))
    replaced = [i for i in range(54) if "/replacement/" in dataset.read.name(i)]
    assert [names(dataset)[i] for i in replaced] == [f"{stem(n)}.mp4" for n in (4, 50)]
    for path in (tmp_path / "test").rglob("*.mp4"):
        path.unlink()
    without = open_dataset("kinetics400", tmp_path, val_share=0.2)
    assert_sound(without, 30, 15, 1)  # the one that has a replacement
    for path in (tmp_path / "replacement").rglob("*.mp4"):
        path.unlink()
    without = open_dataset("kinetics400", tmp_path, val_share=0.2)
    assert_sound(without, 24, 6, 15)
    assert without.source == f"{tmp_path}, no videos of test"


def test_kinetics_videos_that_are_missing_are_counted(tmp_path):
    kinetics_list(tmp_path / "train.csv", range(60), "train")
    kinetics_list(tmp_path / "val.csv", range(60, 90), "val")
    refused(rf"data\.root: none of the 60 training videos is in .*train; the first is to be air drumming/{stem(0)}\.mp4 or",
            "kinetics400", tmp_path)  # fmt: skip
    files(tmp_path / "train", [labelled_folder(n) for n in range(60) if n % 5])
    files(tmp_path / "val", [labelled_folder(n) for n in range(60, 90) if n != 77])
    dataset = open_dataset("kinetics400", tmp_path)
    assert len(dataset) == 48 + 29 and dataset.source == f"{tmp_path}, 13 of 90 listed videos missing"
    identity = dataset.identity()
    assert open_dataset("kinetics400", tmp_path).identity() == identity
    files(tmp_path / "train", [labelled_folder(0)])
    (tmp_path / "train" / labelled_folder(3)).unlink()
    other = open_dataset("kinetics400", tmp_path)
    assert (other.targets_N == dataset.targets_N).all() and other.identity() != identity
    for n in range(60):
        if n % 3 == 1:
            (tmp_path / "train" / labelled_folder(n)).unlink(missing_ok=True)
    fewer = open_dataset("kinetics400", tmp_path)
    assert fewer.classes == LABELS and set(fewer.targets_N[fewer.splits["train"]]) == {0, 2}
    link = tmp_path / "train" / labelled_folder(1)
    (tmp_path / "outside").mkdir()
    link.symlink_to(tmp_path / "outside")
    assert len(open_dataset("kinetics400", tmp_path)) == len(fewer)  # a folder is no video
    link.unlink()
    (tmp_path / "outside/x.mp4").touch()
    link.symlink_to(tmp_path / "outside/x.mp4")
    refused(r"train\.csv, line 3: massaging person's head/.*\.mp4 leads out of .*train, to .*outside.x\.mp4",
            "kinetics400", tmp_path)  # fmt: skip


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("air drumming,--abc,1,11,train,0", "line 3: '--abc' is no YouTube id: 11 letters"),
        ("air drumming,#NAME?,1,11,train,0", r"line 3: '#NAME\?' is no YouTube id"),
        ("air drumming,../../abcde,1,11,train,0", r"line 3: '\.\./\.\./abcde' is no YouTube id"),
        ("air drumming,abcdefghijk,1.5,11,train,0", r"line 3: whole seconds are expected as times, not '1\.5' and '11'"),
        ("air drumming,abcdefghijk,1,-1,train,0", "line 3: whole seconds are expected"),
        (",abcdefghijk,1,11,train,0", "line 3: the label is empty"),
        ("air drumming,abcdefghijk,1,11", "line 3: 4 fields, and the header has 6"),
        ('"air drumming,abcdefghijk,1,11,train,0', r"line \d+: unexpected end of data"),
        (f"air drumming,{youtube(4)},4,14,train,0", rf"line \d+: {stem(4)} is there already, in line 3"),
        (f"air drumming,{youtube(60)},60,70,train,0", rf"val\.csv, line 2: {stem(60)} is there already, in .*train\.csv, line 3"),
    ],
)  # fmt: skip
def test_kinetics_lines_that_are_wrong(tmp_path, line, match):
    kinetics_list(tmp_path / "train.csv", range(60), "train")
    kinetics_list(tmp_path / "val.csv", range(60, 90), "val")
    lines = (tmp_path / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join([*lines[:2], line, *lines[2:]]))
    refused(match, "kinetics400", tmp_path)


def test_kinetics_lists_that_are_wrong(tmp_path):
    refused(
        r"there is no train\.csv in .* or annotations, and no class folders with videos in .*train",
        "kinetics400",
        tmp_path,
    )
    kinetics_list(tmp_path / "val.csv", range(60, 90), "val")
    refused(r"there is a list of validation videos, but no train\.csv", "kinetics400", tmp_path)
    for content, match in [
        (
            "label,youtube_id,time_start\nx,abcdefghijk,1\n",
            "line 2: there is no column time_end, but label, youtube_id",
        ),
        ("youtube_id,time_start,time_end,split\nabcdefghijk,1,11,train\n", "line 2: there is no column label"),
        ("label,youtube_id,time_start,time_end\n", r"train\.csv lists nothing"),
        ("", r"train\.csv lists nothing"),
        ("label,youtube_id,label\n", "line 1: a column is there twice"),
    ]:
        (tmp_path / "train.csv").write_text(content)
        refused(match, "kinetics400", tmp_path)
    (tmp_path / "train.csv").write_bytes(b"label,youtube_id,time_start,time_end\n\xff,abcdefghijk,1,11\n")
    refused(r"cannot read .*train\.csv: .*utf-8", "kinetics400", tmp_path)
    kinetics_list(tmp_path / "train.csv", range(0, 60, 3), "train")
    files(tmp_path / "train", [labelled_folder(n) for n in range(0, 60, 3)])
    refused(
        r"val\.csv, line 3: the label \"massaging person's head\" is none of the 1 of train", "kinetics400", tmp_path
    )
    kinetics_list(tmp_path / "validate.csv", range(60, 90), "val")
    refused(r"has both val\.csv and validate\.csv: remove one", "kinetics400", tmp_path)


@given(st.lists(st.text(max_size=30) | st.from_regex(r"a,[-\w]{10,11},\d{1,3},\d{0,2}", fullmatch=True), max_size=4))
def test_kinetics_lists_are_refused_or_valid(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "train.csv"
    content = "\n".join(["label,youtube_id,time_start,time_end", *lines])
    path.write_text(content, encoding="utf-8", errors="surrogatepass", newline="")
    clips, message = result(kinetics_clips, path)
    if clips is None:
        assert str(path) in message
        return
    assert len({c.stem for c in clips}) == len(clips) > 0
    assert all(c.label and len(c.stem) == 25 and not set(c.stem) & set("./\\\0") for c in clips)


def test_kinetics_folders_without_lists(tmp_path):
    files(tmp_path / "train", [f"{c}/{k}.mp4" for c in ("air_drumming", "yoga") for k in range(10)])
    alone = open_dataset("kinetics400", tmp_path, val_share=0.25)
    assert_sound(alone, 12, 4, 4)
    files(tmp_path / "val", [f"{c}/{k}.webm" for c in ("air drumming", "Yoga") for k in range(5)])
    dataset = open_dataset("kinetics400", tmp_path, val_share=0.1)
    assert_sound(dataset, 18, 2, 10)
    assert dataset.classes == ("air_drumming", "yoga")
    assert dataset.targets_N.tolist() == [0] * 10 + [1] * 10 + [0] * 5 + [1] * 5
    assert dataset.read.name(29) == str(tmp_path / "val/Yoga/4.webm")
    files(tmp_path / "val", ["juggling/0.mp4"])
    refused(r"val.juggling: the label 'juggling' is none of the 2 of train", "kinetics400", tmp_path)
    (tmp_path / "val/juggling/0.mp4").unlink()
    refused(r"data\.root: the class folder .*val.juggling holds no videos", "kinetics400", tmp_path)
    (tmp_path / "val/juggling").rmdir()
    files(tmp_path / "train", ["air drumming/0.mp4"])
    refused(
        r"the class folders air drumming and air_drumming in .*train are spelt too much alike", "kinetics400", tmp_path
    )


# lists


def test_a_list_of_videos(tmp_path):
    files(tmp_path, [f"{c}/{k}.mkv" for c in "ab" for k in range(10)])
    rows = [f"{c}/{k}.mkv,{c}" for c in "ab" for k in range(10)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    dataset = open_dataset("videos", tmp_path, val_share=0.25)
    assert dataset.name == "videos" and dataset.classes == ("a", "b") and isinstance(dataset.read, VideoFiles)
    assert_sound(dataset, 12, 4, 4)
    assert not open_dataset("toy").video
    assert open_dataset("videos", tmp_path / "list.csv", val_share=0.25).identity() == dataset.identity()
    (tmp_path / "list.csv").write_text("path,labels\na/0.mkv,x|y\na/1.mkv,x\nb/0.mkv,\nb/1.mkv,y\nb/2.mkv,y")
    many = open_dataset("videos", tmp_path)
    assert many.multi_label and many.video and many.targets_N[0].tolist() == [1, 1]
    (tmp_path / "list.csv").write_text("path,label\na/0.mkv,x\na/0.avi,y\n")
    refused(r"list\.csv, line 3: there is no file .*a.0\.avi; 1 of 2", "videos", tmp_path)
    refused(r"data\.root: there is no folder or file .*none", "videos", tmp_path / "none")


@pytest.mark.parametrize("name", ["ucf101", "hmdb51", "kinetics400", "videos"])
def test_no_video_is_opened_and_the_decoder_is_handed_on(tmp_path, monkeypatch, name):
    monkeypatch.setattr("av.open", lambda *_, **__: pytest.fail("a video was opened"))
    make = {"ucf101": ucf, "hmdb51": hmdb}.get(name)
    if make:
        make(tmp_path)
    else:
        files(tmp_path / "train", [f"{c}/{k}.mp4" for c in "ab" for k in range(10)])
        if name == "videos":
            rows = [f"train/{c}/{k}.mp4,{c}" for c in "ab" for k in range(10)]
            (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    read = open_dataset(name, tmp_path, decoder="pyav").read
    assert isinstance(read, VideoFiles) and read.decoder == "pyav"
    refused(r"data\.decoder: .*'film'", name, tmp_path, decoder="film")


# groups


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.1, 0.3, 0.9]),
)
def test_groups_are_held_out_whole(rows, share):
    stratum, group_M = (np.array(c) for c in zip(*rows, strict=True))
    rest, held = split_off_groups(stratum, group_M, np.arange(len(rows)) * 2, share, purpose=2)
    assert sorted([*rest, *held]) == list(range(0, 2 * len(rows), 2))
    assert (np.diff(rest) > 0).all() and (np.diff(held) > 0).all()
    assert not {rows[i // 2] for i in rest} & {rows[i // 2] for i in held}
    for label in set(stratum):
        size = Counter(g for s, g in rows if s == label)
        left = {g for g in size if (label, g) in {rows[i // 2] for i in rest}}
        count = sum(n for g, n in size.items() if g not in left)
        missing = share * sum(size.values()) - count
        assert left and abs(missing) <= share * sum(size.values())
        assert len(left) == 1 or all(abs(missing - size[g]) >= abs(missing) for g in left)  # no further one helps


# motion


@pytest.fixture(scope="module")
def clips() -> Dataset:
    return open_dataset("motion")


def test_motion(clips):
    assert_sound(clips, 648, 72, 240)
    assert clips.classes == ("left", "right", "up", "down", "clockwise", "anticlockwise")
    for index_M in clips.splits.values():
        assert len(set(np.bincount(clips.targets_N[index_M]))) == 1
    assert (clips.read.shape_N3 == [24, 40, 40]).all() and clips.read.shape_N3.shape == (960, 3)
    frames = clips.read.frames(7, np.array([5, 0, 5, 23]))
    assert frames.shape == (4, 40, 40, 3) and frames.dtype == np.uint8
    assert (frames[0] == frames[2]).all() and (frames[0] != frames[1]).any()
    assert (np.stack(list(clips.read.every(7)))[[5, 0, 5, 23]] == frames).all()
    assert (clips.read(7) == clips.read.frames(7, np.array([12]))[0]).all()
    assert (pickle.loads(pickle.dumps(clips.read))(7) == clips.read(7)).all()
    assert clips.identity() == open_dataset("motion").identity() and clips.read.why(0) == ""
    assert clips.read.name(959) == "motion/959 (anticlockwise)"
    assert clips.read.frames(0, np.array([], dtype=np.int64)).shape == (0, 40, 40, 3)
    for frame in (-1, 24):
        with pytest.raises(ValueError, match=r"motion/3 \(down\) has no frame"):
            clips.read.frames(3, np.array([0, frame]))


def flow(before_HW: np.ndarray, after_HW: np.ndarray) -> np.ndarray:
    """Least-squares shift to the right and down, in pixels, and clockwise turn, in pixels at 15 from the centre."""
    mean_HW = (before_HW + after_HW) / 2
    down_HW, right_HW = np.gradient(mean_HW)
    y, x = (np.mgrid[:40, :40] - 19.5) / 15
    columns = np.stack([right_HW.ravel(), down_HW.ravel(), (down_HW * x - right_HW * y).ravel()], axis=1)
    return np.linalg.lstsq(columns, (before_HW - after_HW).ravel(), rcond=None)[0]


def test_the_motion_tells_the_class(clips):
    said = []
    for i in range(120):
        grey = clips.read.frames(i, np.array([11, 12])).astype(np.float64).mean(axis=3)
        right, down, clockwise = flow(*grey)
        said.append(np.argmax([-right, right, -down, down, clockwise, -clockwise]))
    assert (np.array(said) == clips.targets_N[:120]).mean() > 0.97


@pytest.mark.parametrize("frame", [0, 12, 23])
def test_a_still_frame_tells_nothing(clips, frame):
    """Means and deviations of every class at every pixel agree, and a classifier of frames stays at chance."""
    image_NP = np.stack([clips.read.frames(i, np.array([frame]))[0].reshape(-1) for i in range(len(clips))]) / 255.0
    for k in range(6):
        one, others = image_NP[clips.targets_N == k], image_NP[clips.targets_N != k]
        error_P = np.sqrt(one.var(axis=0) / len(one) + others.var(axis=0) / len(others))
        assert np.abs((one.mean(axis=0) - others.mean(axis=0)) / error_P).max() < 5.5  # of 4,800 pixels
        assert abs(one.std() - others.std()) < 0.005
    small_NP = image_NP.reshape(-1, 10, 4, 10, 4, 3).mean(axis=(2, 4, 5))
    train, test = clips.splits["train"], clips.splits["test"]
    model = LogisticRegression(C=0.1, max_iter=200).fit(small_NP[train].reshape(-1, 100), clips.targets_N[train])
    chance, deviation = 1 / 6, np.sqrt(5 / 36 / len(test))
    assert abs(model.score(small_NP[test].reshape(-1, 100), clips.targets_N[test]) - chance) < 4 * deviation
    nearest = ((small_NP[test][:, None] - small_NP[train][None]) ** 2).sum(axis=(2, 3)).argmin(axis=1)
    agree = (clips.targets_N[train][nearest] == clips.targets_N[test]).mean()
    assert abs(agree - chance) < 4 * deviation


def test_motion_frames_depend_on_the_index_alone(clips):
    again = MotionClips()
    for i in random.Random(0).sample(range(960), 5):
        assert (again.frames(i, np.arange(24)) == clips.read.frames(i, np.arange(24))).all()
    assert len({clips.read(i).tobytes() for i in range(0, 960, 10)}) == 96
