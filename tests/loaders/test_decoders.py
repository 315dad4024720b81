"""Every decoder gives PyAV's frame for a number; what is known of a file is known exactly; damage is named."""

import gzip
import json
import os
import pickle
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from fasttrain.loaders.video import decoder_cache
from fasttrain.loaders.video import scan as scanning
from fasttrain.loaders.video.decoders import LARGEST_MEAN, choose_decoder, why_pyav
from fasttrain.loaders.video.files import VideoFiles
from fasttrain.loaders.video.scan import scan

from . import videos

DECODERS = ("pyav", "decord", "torchcodec", "dali")
# clips that decord and torchcodec get (they read all that is not special, with a codec that they have)
PLAIN = {"long.mp4", "short.mp4", "varying.mp4", "varying.mkv", "fragments.mp4", "one.mp4", "three.mp4", "odd444.mp4"}
PLAIN |= {
    "bt709.mp4",
    "full_range.mp4",
    "ten_bits.mp4",
    "hevc.mp4",
    "xvid.avi",
    "xvid_odd.avi",
    "mjpeg.avi",
    "vp8.webm",
}
PLAIN |= {"vp9.webm", "turned90.mp4", "turned180.mp4", "turned270.mkv", "latin1.mp4"}


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """The clips that can be read from the first frame to the last, by name."""
    return videos.make(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def truths(clips):
    return {name: videos.truth(path) for name, path in clips.items()}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def decoder(request, need):
    if request.param != "pyav":
        need(request.param)
    return request.param


def asked(count: int) -> list[list[int]]:
    """Numbers of frames to ask for: edges, unordered, repeated, in a row, apart."""
    rng = np.random.default_rng(count)
    start = int(rng.integers(0, max(count - 8, 1)))
    rows = [[count - 1], [0], [count - 1, 0, count // 2, count // 2, min(1, count - 1)], list(range(0, count, 5))]
    return [*rows, list(range(start, min(start + 8, count))), *rng.integers(0, count, (3, 5)).tolist()]


def compare(got: np.ndarray, number: int, truth: list[np.ndarray], *, largest: float) -> None:
    """The frame is nearest to the true one of its number, and near."""
    assert got.dtype == np.uint8 and got.shape == truth[number].shape
    near = range(max(0, number - 12), min(len(truth), number + 13))
    apart = [np.abs(got[::3, ::3].astype(int) - truth[i][::3, ::3]).mean() for i in near]
    assert near[int(np.argmin(apart))] == number or min(apart) == apart[near.index(number)]
    assert np.abs(got.astype(int) - truth[number]).mean() <= largest


@pytest.mark.parametrize("decoder", DECODERS, indirect=True)
@pytest.mark.parametrize("name", videos.WHOLE)
def test_frames_are_pyavs(decoder, name, clips, truths):
    truth, files = truths[name], VideoFiles([clips[name]], decoder)
    assert files.shape_N3.tolist() == [[len(truth), *truth[0].shape[:2]]]
    largest = 0.0 if decoder == "pyav" or why_pyav(decoder, files.scans[0]) else LARGEST_MEAN
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a decoder failed, and PyAV had to read what it was to read
        if (
            decoder == "decord"
        ):  # its FFmpeg pads rows of this width where the CPU has AVX-512, and decord cannot copy them
            warnings.filterwarnings("ignore", message=".*DECORDArrayCopyFromTo")
        for numbers in asked(len(truth)):
            got_THWC = files.frames(0, np.array(numbers))
            assert got_THWC.flags.c_contiguous
            for got, number in zip(got_THWC, numbers, strict=True):
                compare(got, number, truth, largest=largest)
    assert np.array_equal(np.stack(list(files.every(0))), np.stack(truth))
    assert np.array_equal(files(0), files.frames(0, np.array([len(truth) // 2]))[0])


@pytest.mark.parametrize("name", videos.WHOLE)
def test_the_numbers_are_what_the_pictures_say(name, truths):
    first = 8 if name == "edit_list.mp4" else 0
    turn = {"turned180.mp4": 2, "turned270.mkv": 1, "turned90.mp4": 3}.get(name, 0)
    turned = [np.rot90(image, turn) for image in truths[name]]
    if "mirrored" in name:
        turned = [np.rot90(i[:, ::-1], 3 if "90" in name else 0) for i in turned]
    assert [videos.number_of(image) for image in turned] == list(range(first, first + len(turned)))


def test_who_reads_what(clips):
    scans = {name: scan(path) for name, path in clips.items()}
    assert {name for name, s in scans.items() if not why_pyav("decord", s)} == PLAIN - {"hevc.mp4"}
    assert {name for name, s in scans.items() if not why_pyav("torchcodec", s)} == PLAIN
    assert {name for name, s in scans.items() if not why_pyav("dali", s)} == {"mjpeg.avi", "vp8.webm", "vp9.webm"}
    assert not any(why_pyav("pyav", s) for s in scans.values())


def test_describe(clips, need):
    need("decord")
    files = VideoFiles([clips[n] for n in ("long.mp4", "open.mp4", "hevc_open.mp4", "xvid_b_frames.avi")])
    assert files.decoder == "decord" and files.describe().startswith("decord 3")
    assert files.describe().endswith("; pyav for 3 of 4 videos (2 open GOPs, 1 B-frames in AVI)")
    assert VideoFiles([clips["long.mp4"]], "pyav").describe().startswith("pyav ")


@pytest.mark.parametrize("decoder", ["pyav", "decord", "torchcodec"], indirect=True)
def test_eight_bit_video_of_even_size_has_pyavs_bytes(decoder, clips, truths):
    for name in ("long.mp4", "xvid.avi", "bt709.mp4", "full_range.mp4", "turned90.mp4"):
        got_THWC = VideoFiles([clips[name]], decoder).frames(0, np.arange(20))
        assert np.array_equal(got_THWC, np.stack(truths[name][:20]))


def test_common_kinds_are_not_decoded_to_be_scanned(clips, monkeypatch):
    monkeypatch.setattr(scanning, "_decoded", lambda *a: pytest.fail("decoded"))
    for name in ("long.mp4", "varying.mp4", "varying.mkv", "xvid.avi", "hevc.mp4", "vp9.webm", "mjpeg.avi", "open.mp4"):
        assert scan(clips[name]).frames


def test_pyav_begins_at_the_last_place_before_a_frame(clips):
    """A frame of the second half is read without the packets of the first."""
    files = VideoFiles([clips["long.mp4"], clips["xvid.avi"], clips["varying.mkv"]], "pyav")
    for index, start in enumerate((30, 36, 36)):
        assert max(files.scans[index].starts) == start
        content = clips_of(files, index)
        broken = files.paths[index].with_name(f"broken_{files.paths[index].name}")
        videos.damaged(files.paths[index], broken, range(13, 23))
        try:
            assert np.array_equal(VideoFiles([broken], "pyav").frames(0, np.arange(start, 40)), content[start:])
        finally:
            broken.unlink()


def clips_of(files: VideoFiles, index: int) -> np.ndarray:
    return np.stack(list(files.every(index)))


# files that cannot be read, or not in full


def unreadable(folder: Path, clips: dict[str, Path]) -> dict[str, Path]:
    content = clips["short.mp4"].read_bytes()
    paths = {name: folder / name for name in ("text.mp4", "empty.avi", "headless.mp4", "gone.mp4")}
    paths["text.mp4"].write_text("not a video\n" * 100)
    paths["empty.avi"].write_bytes(b"")
    paths["headless.mp4"].write_bytes(content[: len(content) // 2])  # the table of its packets was at its end
    return paths | {"sound.mp4": videos.only_sound(folder / "sound.mp4")}


@pytest.mark.parametrize("decoder", DECODERS, indirect=True)
def test_unreadable_files_have_no_frames_and_a_reason(decoder, clips, tmp_path):
    paths = unreadable(tmp_path, clips)
    files = VideoFiles([*paths.values(), clips["long.mp4"]], decoder)
    assert files.shape_N3[:, 0].tolist() == [0] * len(paths) + [40]
    for index, name in enumerate(paths):
        assert files.why(index) and str(tmp_path) not in files.why(index)
        for read in (lambda i=index: files.frames(i, np.array([0])), lambda i=index: next(files.every(i))):
            with pytest.raises(ValueError, match=f"cannot read the video .*{name}: {files.why(index)[:20]}"):
                read()
        with pytest.raises(ValueError, match=f"cannot read the video .*{name}"):
            files(index)
    assert files.why(list(paths).index("sound.mp4")) == "it has no video"
    assert files.why(list(paths).index("gone.mp4")) == "there is no such file"
    assert files.why(len(paths)) == ""


@pytest.mark.parametrize("decoder", DECODERS, indirect=True)
@pytest.mark.parametrize(("name", "options"), [("long.mp4", "faststart"), ("varying.mkv", ""), ("mjpeg.avi", "")])
def test_a_file_cut_short_has_the_frames_that_pyav_decodes(decoder, name, options, clips, tmp_path):
    path = tmp_path / name
    if options:
        videos.write(path, "libx264", options=videos.X264, b_frames=2, container={"movflags": options})
    else:
        shutil.copy(clips[name], path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    truth, files = videos.truth(path), VideoFiles([path], decoder)
    assert 4 < len(truth) < 30 and files.shape_N3[0, 0] == len(truth)
    for numbers in asked(len(truth)):
        for got, number in zip(files.frames(0, np.array(numbers)), numbers, strict=True):
            compare(got, number, truth, largest=LARGEST_MEAN)
    with pytest.raises(ValueError, match=f"{name}: there is no frame {len(truth)}, only 0 to {len(truth) - 1}"):
        files.frames(0, np.array([0, len(truth)]))


def read(files: VideoFiles, number: int) -> np.ndarray | str:
    """The frame, or the message of the error."""
    try:
        return files.frames(0, np.array([number]))[0]
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("decoder", DECODERS, indirect=True)
@pytest.mark.parametrize("name", ["long.mp4", "varying.mkv", "mjpeg.avi", "hevc.mp4"])
@pytest.mark.filterwarnings("ignore:.*pyav is asked")
def test_damage_in_the_middle_is_named(decoder, name, clips, truths, tmp_path):
    """Whatever is served is the frame of that number; what is not is an error that names the file and the frame."""
    path = videos.damaged(clips[name], tmp_path / name, [6, 7, 8])
    files, truth, count = VideoFiles([path], decoder), truths[name], len(truths[name])
    served = []
    for number in range(count):
        got = read(files, number)
        if isinstance(got, str):
            assert f"cannot read the video {path}: frame {number}" in got
            continue
        served.append(number)
        if number < 4 or number >= 30:  # others may be made up, or come from such
            compare(got, number, truth, largest=LARGEST_MEAN)
    assert {0, 1, 2, 3} <= set(served) and (count < 40 or set(range(30, count)) <= set(served))
    assert len(served) < count
    with pytest.raises(ValueError, match=f"cannot read the video .*{name}: frame "):
        files.frames(0, np.arange(count))
    if decoder != "pyav" and not why_pyav(decoder, files.scans[0]):
        with (
            pytest.warns(UserWarning, match=f"{decoder} cannot read .*{name}, pyav is asked"),
            pytest.raises(ValueError),
        ):
            VideoFiles([path], decoder).frames(0, np.arange(count))


def test_what_pyav_makes_up_does_not_depend_on_where_it_began(clips, tmp_path):
    """FFmpeg hides this damage; what it shows instead is what it shows when all of the file is decoded."""
    for name in ("xvid.avi", "short.mp4"):
        path = videos.damaged(clips[name], tmp_path / name, [13, 14, 15])
        truth, files = videos.truth(path), VideoFiles([path], "pyav")
        assert len(truth) == 40
        for numbers in ([14], [15, 20], list(range(12, 24))):
            assert np.array_equal(files.frames(0, np.array(numbers)), np.stack([truth[i] for i in numbers]))


# what is remembered


def test_scans_are_kept(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [tmp_path / name for name in ("long.mp4", "varying.mkv", "open.mp4")]
    for path in paths:
        shutil.copy(clips[path.name], path)
    seen = []
    first = VideoFiles(paths, "pyav", report=lambda done, total: seen.append((done, total)))
    shape_N3 = first.shape_N3
    assert seen == [(1, 3), (2, 3), (3, 3)] and [p.suffix for p in (tmp_path / "cache/fasttrain/videos").iterdir()] == [
        ".gz"
    ]

    opened = []
    monkeypatch.setattr(decoder_cache, "scan", lambda path: opened.append(path.name) or scan(path))
    again = VideoFiles(paths[::-1], "pyav")
    assert np.array_equal(again.shape_N3[::-1], shape_N3) and opened == []
    for old, new in zip(first.scans, again.scans[::-1], strict=True):
        assert (list(old.pts), list(old.starts)) == (list(new.pts), list(new.starts))
        assert (old.special, old.codec, old.turn) == (new.special, new.codec, new.turn)
    assert np.array_equal(again.frames(2, np.array([39, 3])), first.frames(0, np.array([39, 3])))

    assert np.array_equal(pickle.loads(pickle.dumps(first)).shape_N3, shape_N3) and opened == []

    shutil.copy(clips["three.mp4"], paths[0])
    changed = VideoFiles(paths, "pyav")
    assert changed.shape_N3[:, 0].tolist() == [3, 40, 40] and opened == ["long.mp4"]
    assert changed.fingerprint(1) != "" and changed.fingerprint(3) != again.fingerprint(3)
    assert changed.total_bytes(2) == sum(p.stat().st_size for p in paths[:2])


@pytest.mark.parametrize(
    "content", [b"", b"no gzip", "cut", '["fasttrain videos 1", ["a", 1]]', '["fasttrain videos 1", 3]']
)
def test_a_damaged_cache_is_done_without(content, clips, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert VideoFiles([clips["long.mp4"]], "pyav").shape_N3[0, 0] == 40
    (place,) = (tmp_path / "fasttrain/videos").iterdir()
    whole = place.read_bytes()
    if content == "cut":
        content = whole[: len(whole) // 2]
    place.write_bytes(gzip.compress(content.encode()) if isinstance(content, str) else content)
    with pytest.warns(UserWarning, match="the videos are looked through again: cannot read"):
        assert VideoFiles([clips["long.mp4"]], "pyav").shape_N3[0, 0] == 40
    assert json.loads(gzip.decompress(place.read_bytes())) == json.loads(gzip.decompress(whole))


def test_an_interrupted_look_through_is_gone_on_with(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = [clips[name] for name in ("long.mp4", "short.mp4", "open.mp4", "xvid.avi")]

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        VideoFiles(paths, "pyav", report=interrupt).scans  # noqa: B018 - asked for is looked for
    seen: list[tuple[int, int]] = []
    assert VideoFiles(paths, "pyav", report=lambda *counts: seen.append(counts)).shape_N3[:, 0].tolist() == [40] * 4
    assert seen == [(1, 2), (2, 2)]


def test_a_cache_that_cannot_be_written_is_told_of(clips, tmp_path, monkeypatch):
    (tmp_path / "fasttrain").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="will be looked through again the next time: cannot write"):
        assert VideoFiles([clips["long.mp4"]], "pyav").shape_N3[0, 0] == 40


# threads, processes, memory


@pytest.mark.parametrize("decoder", DECODERS, indirect=True)
def test_threads(decoder, clips, truths):
    names = ["long.mp4", "xvid.avi", "open.mp4", "vp9.webm", "turned90.mp4"]
    files = VideoFiles([clips[n] for n in names], decoder)
    rng = np.random.default_rng(0)
    work = [(int(i), rng.integers(0, 40, 6)) for i in rng.integers(0, len(names), 60)]
    with ThreadPoolExecutor(6) as pool:
        for (index, numbers), got_THWC in zip(work, pool.map(lambda w: files.frames(*w), work), strict=True):
            for got, number in zip(got_THWC, numbers.tolist(), strict=True):
                compare(got, number, truths[names[index]], largest=LARGEST_MEAN)
    files.close()
    assert not files._idle and len(files.frames(0, np.array([1]))) == 1


@pytest.mark.parametrize("decoder", DECODERS, indirect=True)
def test_forked_processes_read_too(decoder, clips):
    """Forked while files are open, and while another thread reads."""
    files = VideoFiles([clips[n] for n in ("long.mp4", "open.mp4", "vp9.webm")], decoder)
    numbers = np.array([30, 2, 39])

    def read_all() -> list[np.ndarray]:
        return [files.frames(index, numbers) for index in range(3)]

    before = read_all()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(lambda: [read_all() for _ in range(10)])
        children = [
            forked(lambda: all(map(np.array_equal, read_all() + read_all(), before + before))) for _ in range(2)
        ]
        assert all(map(np.array_equal, read_all(), before))
        busy.result()
    assert [ended(child) for child in children] == [0, 0]


def forked(work: Callable[[], bool]) -> int:
    child = os.fork()
    if not child:
        try:
            os._exit(0 if work() else 3)
        finally:
            os._exit(4)
    return child


def ended(child: int) -> int:
    """How a process ended, within 20 seconds."""
    for _ in range(400):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@pytest.mark.parametrize("decoder", DECODERS, indirect=True)
def test_memory_stays(decoder, clips):
    """Files enough that readers are closed and opened all the time."""
    names = [*[n for n in videos.WHOLE if n not in ("one.mp4", "three.mp4")][:14], "vp8.webm", "vp9.webm"]
    files = VideoFiles([clips[n] for n in names], decoder)
    rng = np.random.default_rng(0)

    def used(times: int) -> int:
        for i in range(times):
            files.frames(i % len(names), rng.integers(0, 30, 4))
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = used(96)
    assert used(192) - before < 12 << 20
    assert len(files._idle) <= 8


def test_unknown_and_missing_decoders(monkeypatch):
    with pytest.raises(
        ValueError, match=r"data\.decoder: there is no 'ffmpeg'; use auto, decord, torchcodec, pyav, dali"
    ):
        VideoFiles([], "ffmpeg")
    for name, module in (("decord", "decord"), ("torchcodec", "torchcodec.decoders"), ("dali", "nvidia.dali")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=rf"data.decoder: {name} is not here \(ModuleNotFoundError.*use pyav"):
            VideoFiles([], name)
    assert choose_decoder("auto")[0] == VideoFiles([]).decoder == "pyav"


@cache
def real_truth(path: Path) -> list[np.ndarray]:
    return videos.truth(path)


@pytest.mark.parametrize("decoder", DECODERS, indirect=True)
def test_real_clips(decoder, real_clips):
    paths = [real_clips / name for name in videos.REAL_FRAMES]
    files = VideoFiles(paths, decoder)
    assert files.shape_N3[:, 0].tolist() == list(videos.REAL_FRAMES.values())
    rng = np.random.default_rng(0)
    for index, path in enumerate(paths):
        count = int(files.shape_N3[index, 0])
        truth = real_truth(path)
        for start in (0, int(rng.integers(0, count - 8)), count - 8):
            numbers = np.array([start, start + 7, start + 3])
            for got, number in zip(files.frames(index, numbers), numbers.tolist(), strict=True):
                compare(got, number, truth, largest=LARGEST_MEAN)
