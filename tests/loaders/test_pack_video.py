"""Packing videos: the frames and their order, what is left out, stops and kills, full disks, and reading clips again."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain.loaders import Dataset, growing, open_dataset
from fasttrain.loaders.beton import JPEG, read_beton
from fasttrain.loaders.decode import decode
from fasttrain.loaders.pack import check, pack
from fasttrain.loaders.pack_video import pack_videos, ssim
from fasttrain.loaders.seek import seek_index
from fasttrain.loaders.video.packed import PackedClips
from PIL import Image

from .jpegs import jpeg, photo
from .memory_clips import MemoryClips, videos
from .test_pack import ffcv_reads, left_over, refusal

SHAPES = [(5, 40, 60), (1, 60, 40), (9, 24, 24), (3, 50, 31), (7, 20, 90), (4, 65, 97), (2, 24, 25), (6, 30, 30)]
BROKEN = {1: -1, 5: 2}
GOOD = [i for i in range(len(SHAPES)) if i not in BROKEN]


class Photographs(MemoryClips):
    """Frames of a photograph, each a little further to the right."""

    def __init__(self, shape_N3, broken=None) -> None:
        super().__init__(shape_N3, broken)
        for index, (count, height, width) in enumerate(shape_N3):
            wide = np.asarray(photo(width + count, height, which=index % 2))
            self.videos[index] = np.stack([wide[:, t : t + width] for t in range(count)])


def with_read(source: Dataset, read: MemoryClips) -> Dataset:
    return Dataset(source.name, source.classes, source.targets_N, read, source.splits, source.source)


def photographs(shape_N3=SHAPES, broken=BROKEN) -> Dataset:
    return with_read(videos(shape_N3, broken), Photographs(shape_N3, broken))


def side(path: Path) -> dict:
    return json.loads(Path(f"{path}.json").read_text())


def content(path: Path) -> tuple[bytes, bytes, bytes]:
    return tuple(Path(f"{path}{end}").read_bytes() for end in ("", ".json", ".bad.jsonl"))


def is_what(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) as packed."""
    scale = min(short_side / min(size), 1) if short_side else 1
    return round(size[0] * scale), round(size[1] * scale)


# what is packed


@pytest.mark.parametrize(("short_side", "quality", "seek"), [(24, 90, True), (24, 60, False), (0, 90, True)])
def test_frames_are_jpegs_one_after_the_other(tmp_path, short_side, quality, seek):
    source, out = photographs(), tmp_path / "x.beton"
    about = pack_videos(source, out, short_side=short_side, quality=quality, seek=seek, workers=3)
    file, whole, frame = read_beton(out), out.read_bytes(), 0
    for video in GOOD:
        size = is_what(SHAPES[video][1:], short_side)
        for image_HWC in source.read.every(video):
            image = Image.fromarray(image_HWC)
            if size != image_HWC.shape[:2]:
                image = image.resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0)
            expected, ptr = jpeg(image, quality=quality), int(file.ptr_N[frame])
            assert whole[ptr : ptr + int(file.size_N[frame])] == expected
            index = seek_index(expected)
            assert index and (whole[ptr - len(index) : ptr] == index) == seek
            assert (file.height_N[frame], file.width_N[frame]) == size and file.mode_N[frame] == JPEG
            assert file.targets_N[frame] == source.targets_N[video]
            frame += 1
    assert frame == len(file) == about["samples"] == sum(SHAPES[v][0] for v in GOOD)
    assert about["options"] == {"short_side": short_side, "quality": quality, "seek": seek}
    assert about["videos"]["first"] == [0, *np.cumsum([SHAPES[v][0] for v in GOOD])]
    assert about["videos"]["names"] == [f"video{v}" for v in GOOD]
    assert about["bytes"] == len(whole) and about["bad"] == len(BROKEN)
    assert check(out) == about == side(out) and left_over(tmp_path) == []


def test_sizes_are_rounded_and_never_enlarged(tmp_path):
    sizes = [(90, 120), (31, 500), (24, 24), (10, 80), (25, 24), (64, 41)]
    pack_videos(videos([(1, *s) for s in sizes]), tmp_path / "x.beton", short_side=24)
    found = open_dataset("beton", tmp_path / "x.beton").read.shape_N3[:, 1:].tolist()
    assert found == [[24, 32], [24, 387], [24, 24], [10, 80], [25, 24], [37, 24]]


def test_packed_videos_are_the_videos(tmp_path):
    source, out = photographs(), tmp_path / "x.beton"
    about = pack_videos(source, out, short_side=24)
    packed = open_dataset("beton", out)
    read, images = packed.read, read_beton(out)
    assert isinstance(read, PackedClips) and packed.video
    assert (packed.name, packed.classes, packed.content) == (source.name, source.classes, about["sha256"])
    assert packed.targets_N.tolist() == source.targets_N[GOOD].tolist() and packed.targets_N.dtype == np.int64
    for split, index_M in source.splits.items():
        assert [GOOD[i] for i in packed.splits[split]] == [i for i in index_M if i in GOOD]
    assert read.shape_N3.dtype == np.int64 and read.shape_N3[:, 0].tolist() == [SHAPES[v][0] for v in GOOD]
    for i, was in enumerate(GOOD):
        first = int(read.first_V[i])
        expected = np.stack([
            decode(read.packed.encoded(first + t), "") for t in range(SHAPES[was][0])
        ])  # fmt: skip
        assert expected.shape[1:3] == is_what(SHAPES[was][1:], 24)
        assert (np.stack([*read.every(i)]) == expected).all()
        frame_T = np.random.default_rng(i).integers(0, len(expected), 12)
        assert (read.frames(i, frame_T) == expected[frame_T]).all()
        assert (read(i) == expected[len(expected) // 2]).all()
        original = source.read.frames(was, np.arange(len(expected)))
        if is_what(SHAPES[was][1:], 24) == SHAPES[was][1:]:
            assert np.abs(original.astype(int) - expected).mean() < 8
        assert f"video{was}" in read.name(i) and str(out) in read.name(i) and read.why(i) == ""
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=rf"x\.beton, video 0 \(video0\) has no frame {wrong}: it has 5"):
            read.frames(0, np.array([2, wrong]))
    assert read.frames(0, np.zeros(0, np.int64)).shape == (0, 24, 36, 3)
    assert read.total_bytes(len(GOOD)) == images.size_N.sum() > read.total_bytes(2) == images.size_N[:14].sum()
    assert len({read.fingerprint(n) for n in range(1, 7)}) == 6


def test_names_are_those_below_the_folder_that_videos_share(tmp_path):
    class Named(MemoryClips):
        def name(self, index):
            return f"/data/set/{'ab'[index % 2]}/{index}.avi"

    source = with_read(videos(SHAPES), Named(SHAPES))
    assert pack_videos(source, tmp_path / "x.beton", short_side=24)["videos"]["names"][:3] == [
        "a/0.avi",
        "b/1.avi",
        "a/2.avi",
    ]


def test_a_packed_set_is_packed_anew(tmp_path):
    """Smaller, for instance."""
    pack_videos(photographs(), tmp_path / "x.beton", short_side=0)
    first = open_dataset("beton", tmp_path / "x.beton")
    about = pack_videos(first, tmp_path / "again.beton", short_side=20, quality=70)
    again = open_dataset("beton", tmp_path / "again.beton")
    assert about["videos"] == side(tmp_path / "x.beton")["videos"] and again.splits.keys() == first.splits.keys()
    assert again.read.shape_N3[:, 1:].min(axis=1).tolist() == [20] * len(GOOD)
    assert again.identity() != first.identity()


def test_several_labels_a_video(tmp_path):
    source, labels = photographs(), np.eye(3, dtype=np.float32)[np.arange(8) % 3] * [1, 1, -1]
    several = Dataset("many", ("a", "b", "c"), labels.astype(np.float32), source.read, source.splits, "")
    pack_videos(several, tmp_path / "x.beton")
    packed = open_dataset("beton", tmp_path / "x.beton")
    assert packed.multi_label and (packed.targets_N == labels[GOOD]).all()


def test_images_and_videos_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="memory holds videos: pack_videos packs them"):
        pack(photographs(), tmp_path / "x.beton")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quality": 0}, "--quality: 0 is not between 1 and 100"),
        ({"short_side": -1}, "--short-side: -1 is not between 0"),
        ({"short_side": 65_536}, "--short-side: 65536 is not between 0"),
        ({"workers": -1}, "--workers: -1 is below 0"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        pack_videos(photographs(), tmp_path / "x.beton", **options)
    assert not list(tmp_path.iterdir())


def test_ffcv_reads_the_frames_as_images(need, tmp_path):
    need("ffcv")
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder

    source, out = photographs([(count, 24, 32) for count, _, _ in SHAPES]), tmp_path / "x.beton"
    about = pack_videos(source, out)
    order = np.random.default_rng(0).permutation(about["samples"])
    pixels, labels = ffcv_reads(out, SimpleRGBImageDecoder(), IntDecoder(), os_cache=True, order=order)
    frames = np.concatenate([source.read.videos[v] for v in GOOD])
    assert (labels[:, 0] == np.repeat(source.targets_N[GOOD], [SHAPES[v][0] for v in GOOD])[order]).all()
    assert np.abs(pixels.astype(int) - frames[order]).mean() < 8


# quality


def test_ssim_is_that_of_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure

    one = torch.stack([torch.tensor(np.asarray(photo(70, 50, which=w))).permute(2, 0, 1) for w in (0, 1)])
    noisy = (one + 30 * torch.randn(one.shape)).clamp(0, 255).to(torch.uint8)
    for other in (noisy, one.roll(1, 3), 255 - one):
        _, every_BCHW = structural_similarity_index_measure(
            other.double(), one.double(), data_range=255.0, return_full_image=True
        )
        whole_windows = every_BCHW[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
        torch.testing.assert_close(ssim(one, other), whole_windows, atol=1e-9, rtol=0)
    assert (ssim(one, one) == 1).all() and (ssim(one, noisy) < 0.9).all()


def test_the_loss_of_quality_is_measured(tmp_path):
    shapes = [(3, 128, 150)] * 20
    found = {}
    for quality in (5, 90):
        source = photographs(shapes, {4: -1})
        found[quality] = pack_videos(source, tmp_path / f"{quality}.beton", quality=quality)["ssim_112"]
        assert found[quality]["frames"] == 16 and found[quality]["lowest"] <= found[quality]["mean"] < 1
    assert found[90]["lowest"] > 0.93 and found[5]["mean"] < 0.9


def test_originals_that_cannot_be_read_again_are_not_compared(tmp_path):
    class InOrder(Photographs):
        def __call__(self, index):
            raise ValueError("cannot seek")

    about = pack_videos(with_read(photographs(), InOrder(SHAPES, BROKEN)), tmp_path / "x.beton")
    assert about["ssim_112"] == {"mean": None, "lowest": None, "colour": None, "frames": 0}


# what is left out


class Odd(MemoryClips):
    """Video 0 has a frame less than it was said to have, video 2 has one more, and video 4's are of several sizes."""

    def every(self, index):
        frames = [*super().every(index)]
        if index == 4:
            frames = [frames[0], frames[1][::2, ::2], np.repeat(frames[2], 3, axis=1), *frames[3:]]
        return iter(frames[:-1] if index == 0 else frames + frames[:1] if index == 2 else frames)


def test_broken_videos_are_left_out_and_listed(tmp_path):
    source, out = with_read(videos(SHAPES), Odd(SHAPES, BROKEN)), tmp_path / "x.beton"
    about = pack_videos(source, out, workers=2)
    lines = [json.loads(line) for line in Path(f"{out}.bad.jsonl").read_text().splitlines()]
    why = {line["index"]: line["why"] for line in lines}
    assert [line["index"] for line in lines] == [0, 1, 2, 5] and about["bad"] == 4
    assert all(line["name"] == f"video{line['index']}" for line in lines)
    assert why[0] == "the video video0 was to have 5 frames, and has only 4"
    assert why[1] == "cannot read the video video1: it is broken"
    assert why[2] == "the video video2 was to have 9 frames, and has more"
    assert why[5] == "cannot read the video video5: frame 2 is damaged"
    packed = open_dataset("beton", out)
    assert packed.read.shape_N3.tolist() == [list(SHAPES[v]) for v in (3, 4, 6, 7)]  # of the first frame's size
    assert {k: v.tolist() for k, v in packed.splits.items()} == {"train": [0, 2, 3], "val": [1], "test": []}


def test_nothing_to_pack(tmp_path):
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"none of the 2 samples of memory can be decoded; see .*x\.beton\.bad\.jsonl"
        ):
            pack_videos(videos([(3, 20, 20)] * 2, {0: -1, 1: 0}), tmp_path / "x.beton")
        assert len((tmp_path / "x.beton.bad.jsonl").read_text().splitlines()) == 2


# long videos


class Frame(np.ndarray):
    """An array that can be watched."""


class Long(MemoryClips):
    """Videos of which all frames together would be a lot; knows how many frames were alive at once, and how many videos begun."""

    def __init__(self, shape_N3) -> None:
        super().__init__([(1, 1, 1)] * len(shape_N3))
        self.shape_N3 = np.array(shape_N3, dtype=np.int64)
        self.alive, self.most, self.begun, self.lock = 0, 0, 0, threading.RLock()

    def count(self, change: int) -> None:
        with self.lock:
            self.alive += change
            self.most = max(self.most, self.alive)

    def every(self, index):
        self.begun += 1
        count, height, width = self.shape_N3[index]
        for _ in range(count):
            image = np.zeros((height, width, 3), np.uint8).view(Frame)
            self.count(1)
            weakref.finalize(image, self.count, -1)
            yield image

    def frames(self, index, frame_T):
        return np.zeros((len(frame_T), *self.shape_N3[index, 1:], 3), np.uint8)


def test_frames_are_encoded_as_they_come_and_few_videos_ahead(tmp_path):
    read, ahead = Long([(300, 20, 20)] * 12), []
    source = with_read(videos([(1, 20, 20)] * 12), read)
    pack_videos(source, tmp_path / "x.beton", workers=2, report=lambda now: ahead.append(read.begun - now.done))
    assert read.most <= 2 * 3 and max(ahead) <= 4


def test_an_interrupt_does_not_wait_for_long_videos(tmp_path):
    read = Long([(1, 20, 20), (10**7, 20, 20)])

    def report(now):
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pack_videos(with_read(videos([(1, 20, 20)] * 2), read), tmp_path / "x.beton", workers=2, report=report)
    assert time.monotonic() - begin < 20  # ten million frames take half an hour


# stops


@pytest.fixture
def often(monkeypatch):
    """Every few frames something is safely on disk; returns the videos that were decoded."""
    decoded: list[int] = []
    every = Photographs.every
    monkeypatch.setattr(growing, "SYNC_BYTES", 6_000)
    monkeypatch.setattr(Photographs, "every", lambda self, i: decoded.append(i) or every(self, i))
    return decoded


MANY = [SHAPES[i % 8] for i in range(60)]
MANY_BROKEN = {0: -1, 7: 1, 8: -1, 33: 0, 59: -1}


@cache
def many() -> Dataset:
    return photographs(MANY, MANY_BROKEN)


def stopped(source: Dataset, out: Path, at: int) -> None:
    def report(now):
        if now.done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_videos(source, out, report=report, workers=2)


def test_a_stopped_packing_goes_on_from_a_whole_video(tmp_path, often):
    pack_videos(many(), tmp_path / "whole.beton")
    whole = content(tmp_path / "whole.beton")
    for stop, torn in ((1, 0), (34, 1), (59, 100), (60, 60)):
        out = tmp_path / f"{stop}.beton"
        stopped(many(), out, stop)
        with Path(f"{out}.partial").open("ab") as partial:
            partial.write(b"not yet safe" * 1000)
        log = Path(f"{out}.partial.log")
        if torn:  # as where the disk was full in the middle of it
            os.truncate(log, log.stat().st_size - torn)
        said = log.read_bytes().split(b"\n", 1)[1]
        record_N = np.frombuffer(said, growing.RECORD, count=len(said) // growing.RECORD.itemsize)
        safe = [int(r["index"]) for r in record_N if r["follow"] == 0]
        assert safe == list(range(len(safe))) and stop - 12 < len(safe) <= stop
        often.clear()
        pack_videos(many(), out)
        assert sorted(often) == [i for i in range(len(safe), 60) if MANY_BROKEN.get(i, 0) >= 0]
        assert content(out) == whole and left_over(tmp_path) == []


def pack_until_killed(out: str) -> None:
    """For a process of its own; it packs and soon stands still, much of it on disk and some of it not."""
    growing.SYNC_BYTES = 6_000

    def report(now):
        if now.done == 40:
            print("here", flush=True)
            time.sleep(100)

    pack_videos(many(), Path(out), report=report, workers=2)


def test_a_packing_that_is_killed_goes_on(tmp_path, repository, often):
    out = tmp_path / "x.beton"
    code = f"from tests.loaders import test_pack_video as t; t.pack_until_killed({str(out)!r})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=repository, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not out.exists() and Path(f"{out}.partial").exists()
    pack_videos(many(), out)
    assert 15 < len(often) < 35
    pack_videos(many(), tmp_path / "whole.beton")
    assert content(out) == content(tmp_path / "whole.beton")


def test_other_data_or_options_are_not_gone_on_with(tmp_path, often):
    out = tmp_path / "x.beton"
    stopped(many(), out, 40)
    for options in ({"quality": 50}, {"short_side": 30}, {"seek": False}):
        with pytest.raises(ValueError, match=r"its options changed since the packing into .*x\.beton\.partial began"):
            pack_videos(many(), out, **options)
    with pytest.raises(ValueError, match=r"the data set changed since the packing into .* delete that file"):
        pack_videos(photographs(MANY[:-1], {0: -1}), out)
    about = pack_videos(many(), out)
    often.clear()
    assert pack_videos(many(), out) == about and often == []
    with pytest.raises(ValueError, match=r"x\.beton is there already, packed from other data or with other options"):
        pack_videos(many(), out, quality=10)


def test_a_log_that_skips_a_video_is_not_gone_on_with(tmp_path, often):
    pack_videos(many(), tmp_path / "whole.beton")
    stopped(many(), tmp_path / "x.beton", 40)
    log = tmp_path / "x.beton.partial.log"
    first, _, rest = log.read_bytes().partition(b"\n")
    log.write_bytes(first + b"\n" + rest[growing.RECORD.itemsize :])
    often.clear()
    pack_videos(many(), tmp_path / "x.beton")
    assert len(often) == 60 - 3  # begun anew
    assert content(tmp_path / "x.beton") == content(tmp_path / "whole.beton")


# full disks


def test_a_full_disk_is_named_and_packing_goes_on_when_there_is_room(tmp_path, often):
    """Files may not grow beyond some bytes: the system's own write fails, as on a full disk."""
    pack_videos(many(), tmp_path / "whole.beton")
    limits, size = resource.getrlimit(resource.RLIMIT_FSIZE), (tmp_path / "whole.beton").stat().st_size
    for limit in (10, (2 << 20) + 9_000, (2 << 20) + 150_000, size - 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            says = r"cannot write .*x\.beton\.partial \(sample \d+ of 60\): File too large; the same command goes on"
            with pytest.raises(ValueError, match=says):
                pack_videos(many(), tmp_path / "x.beton")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    often.clear()
    pack_videos(many(), tmp_path / "x.beton")
    assert often == [] and content(tmp_path / "x.beton") == content(tmp_path / "whole.beton")


def test_no_space_at_any_write(tmp_path, often, monkeypatch):
    out, fsync, failures, left = tmp_path / "x.beton", os.fsync, 0, 0
    pack_videos(many(), tmp_path / "whole.beton")

    def full(file):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    for left in (0, 1, 2, 3, 10, 11, 12, 1000):  # noqa: B007 - full() counts it down
        why = refusal(lambda: pack_videos(many(), out, workers=1))
        assert not why or (str(out) in why and "No space left on device" in why)
        failures += why != ""
    assert failures > 4 and content(out) == content(tmp_path / "whole.beton")


# what lies beside

WHOLE = {"first": [0, 5, 14, 17, 24, 26, 32], "names": [f"video{v}" for v in GOOD]}
EDITS: dict[str, tuple[object, str]] = {
    "no dict": ([1, 2], "videos is to have two lists, first and names"),
    "nothing": (None, "videos is to have two lists"),
    "no names": ({"first": [0, 32]}, "videos is to have two lists"),
    "names no list": (WHOLE | {"names": "abcdef"}, "videos is to have two lists"),
    "names no names": (WHOLE | {"names": [1, 2, 3, 4, 5, 6]}, "list of whole numbers, and names one of names"),
    "fractions": (WHOLE | {"first": [0, 5.5, 14, 17, 24, 26, 32]}, "first is to be a list of whole numbers"),
    "truth": (WHOLE | {"first": [False, 5, 14, 17, 24, 26, 32]}, "first is to be a list of whole numbers"),
    "one short": (WHOLE | {"first": [0, 5, 14, 17, 24, 32]}, "videos has 6 names and 6 numbers"),
    "empty": ({"first": [0], "names": []}, "videos has 0 names and 1 numbers"),
    "not from 0": (WHOLE | {"first": [1, 5, 14, 17, 24, 26, 32]}, "does not ascend from 0 to 32"),
    "beyond": (WHOLE | {"first": [0, 5, 14, 17, 24, 26, 33]}, "does not ascend from 0 to 32"),
    "far beyond": (WHOLE | {"first": [0, 5, 14, 17, 24, 26, 10**30]}, "does not ascend from 0 to 32"),
    "short": (WHOLE | {"first": [0, 5, 14, 17, 24, 26, 31]}, "does not ascend from 0 to 32"),
    "no frames": (WHOLE | {"first": [0, 5, 14, 17, 17, 26, 32]}, "does not ascend from 0 to 32"),
    "backwards": (WHOLE | {"first": [0, 5, 14, 4, 24, 26, 32]}, "does not ascend from 0 to 32"),
    "negative": (WHOLE | {"first": [0, -5, 14, 17, 24, 26, 32]}, "does not ascend from 0 to 32"),
    "size": (WHOLE | {"first": [0, 4, 14, 17, 24, 26, 32]}, r"the frames of video 1 \(video2\) differ in size"),
    "label": (WHOLE | {"first": [0, 5, 14, 17, 24, 28, 32]}, r"the frames of video 4 \(video6\) differ in label"),
}


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory) -> Path:
    """Videos 6 and 7 (from 24 and 26 on) differ in their labels alone."""
    out = tmp_path_factory.mktemp("packed") / "x.beton"
    about = pack_videos(photographs([*SHAPES[:6], (2, 24, 24), (6, 24, 24)]), out, short_side=24)
    assert about["videos"] == WHOLE
    return out


def changed(packed_file: Path, tmp_path: Path, change: dict) -> Path:
    path = tmp_path / "x.beton"
    path.symlink_to(packed_file)
    Path(f"{path}.json").write_text(json.dumps(side(packed_file) | change))
    return path


@pytest.mark.parametrize("edit", EDITS)
def test_what_is_said_of_the_videos_has_to_fit(edit, packed_file, tmp_path):
    said, match = EDITS[edit]
    path = changed(packed_file, tmp_path, {"videos": said})
    functions: list[Callable] = [lambda: open_dataset("beton", path), lambda: check(path)]
    for function in functions:
        with pytest.raises(ValueError, match=rf"x\.beton\.json: .*{match}"):
            function()


def test_splits_are_of_videos(packed_file, tmp_path):
    path = changed(packed_file, tmp_path, {"splits": {"train": [[0, 7]], "val": [], "test": []}})
    with pytest.raises(ValueError, match=r"x\.beton\.json: its split train names samples beyond the 6"):
        open_dataset("beton", path)


def test_a_frame_that_is_damaged_is_named(packed_file, tmp_path):
    whole, file = packed_file.read_bytes(), read_beton(packed_file)
    path = changed(packed_file, tmp_path, {})
    path.unlink()
    at = int(file.ptr_N[7])
    path.write_bytes(whole[:at] + bytes(30) + whole[at + 30 :])
    read = open_dataset("beton", path).read
    assert read.frames(1, np.array([1])).shape == (1, 24, 24, 3)
    with pytest.raises(ValueError, match=r"cannot read the image .*x\.beton, sample 7"):
        read.frames(1, np.array([1, 2]))
    with pytest.raises(ValueError, match="is damaged: its SHA-256"):
        check(path)
