"""Rows that decode on a GPU: their clips are the loader's, whatever decodes; a wrong frame is seen; libraries take our words.

NVDEC itself is tried by ``tests/gpu/test_video_loaders.py``; here frames come from a CPU.
"""

import inspect
import itertools
import re
import sys
import threading
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from fasttrain.benchmarks import video, video_gpu
from fasttrain.loaders import ClipPlan, LoaderSpec, ViewPlan, open_dataset, open_loader
from fasttrain.loaders.pack_video import pack_videos
from fasttrain.loaders.video.decoders import LARGEST_MEAN

from tests.loaders.memory_clips import videos
from tests.loaders.videos import picture, write

CPU = torch.device("cpu")
SHAPES = [(30, 40, 50), (9, 33, 60), (50, 48, 36), (4, 40, 40), (22, 40, 50), (31, 40, 50), (12, 90, 50)]


def spec(dataset, **changes) -> LoaderSpec:
    values = {"index_N": np.arange(len(dataset)), "plan": ViewPlan("corner"), "size": 24, "stored": 0, "batch": 4}
    return LoaderSpec(dataset, **values | {"clip": ClipPlan(6, 2), "seed": 3, "view_seed": 4} | changes)


def served(given: LoaderSpec, count: int) -> list:
    loader = open_loader("video", given, workers=1)
    try:
        return list(itertools.islice((b for _ in range(count) for b in loader), count))
    finally:
        loader.close()


class Shifted:
    """Frames of a data set, ``by`` frames too far on, with ``more`` added to each byte."""

    def __init__(self, read, by: int = 0, more: int = 0) -> None:
        self.read, self.by, self.more = read, by, more

    def __call__(self, index, frame_T):
        frame_T = np.clip(frame_T + self.by, 0, self.read.shape_N3[index, 0] - 1)
        clip_THWC = self.read.frames(index, frame_T).astype(np.int64) + self.more
        return torch.from_numpy(clip_THWC.clip(0, 255).astype(np.uint8))


def threads_row(given: LoaderSpec, frames) -> video_gpu.Row:
    return video_gpu.Row(given, video_gpu.Threads(frames, given.size, CPU, 2), 2)


@pytest.mark.parametrize("size", [24, 40])
def test_clips_are_the_loaders_to_the_byte(size):
    """Videos of several sizes, through epochs whose last batch is not full."""
    given = spec(videos(SHAPES), size=size)
    row = threads_row(given, Shifted(given.dataset.read))
    for batch in served(given, 5):
        todo, pixels = row.batch()
        assert (todo.index_B == batch.index.numpy()).all() and (todo.view.number_B == batch.view.numpy()).all()
        assert pixels.is_contiguous(memory_format=torch.channels_last_3d) and torch.equal(pixels, batch.pixels)
    assert row.serve(9) == 3 + 4 + 3
    row.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("nvdec")]


@pytest.fixture(scope="module")
def still():
    """Pale frames that hardly change: by about one of 255 on average from one to the next."""
    given = spec(videos([(30, 40, 50)] * 4))
    pale = 128 + (picture(0, width=50, height=40).astype(int) - 128) // 5
    for v, frame_THWC in enumerate(given.dataset.read.videos):
        for t in range(len(frame_THWC)):
            frame_THWC[t] = np.roll(pale, (v, t), axis=(0, 1))
    return given


@pytest.mark.parametrize(("by", "more", "wrong"), [(0, 0, False), (0, 2, False), (1, 0, True), (0, 5, True)])
def test_a_wrong_frame_is_seen(by, more, wrong):
    given = spec(videos(SHAPES))
    row = threads_row(given, Shifted(given.dataset.read, by, more))
    said = video_gpu.wrong_frames(given, *row.batch())
    row.close()
    assert bool(said) is wrong
    if wrong:
        assert "of 255 on average" in said and "frame " in said


@pytest.mark.parametrize("more", [0, 1])
def test_a_frame_too_far_is_seen_where_little_moves(still, more):
    """Though no frame differs by more than colours may: each is nearer to its neighbour, or all of them together are."""
    for by, wrong in ((1, True), (-1, True), (0, False)):
        row = threads_row(still, Shifted(still.dataset.read, by, more))
        said = video_gpu.wrong_frames(still, *row.batch())
        row.close()
        assert bool(said) is wrong
        if said:
            off = float(re.search(r" by (\S+) of 255", said)[1])
            assert off < video_gpu.LARGEST_MEAN


def test_the_decoders_use_is_told_as_far_as_nvml_tells_it(monkeypatch):
    class Refused(Exception):
        pass

    def refuse(handle):
        raise Refused("Not Supported")

    module = SimpleNamespace(
        NVMLError=Refused,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=7, memory=1),
        nvmlDeviceGetDecoderUtilization=lambda handle: [83, 167000],
        nvmlDeviceGetJpgUtilization=refuse,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    assert video_gpu.decoder_gauge(torch.device("cuda"))() == {"gpu_percent": 7.0, "nvdec_percent": 83.0}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert video_gpu.decoder_gauge(torch.device("cuda"))() == {} == video_gpu.decoder_gauge(CPU)()


def test_a_row_whose_frames_differ_is_not_run(monkeypatch):
    given = spec(videos(SHAPES))

    def made(spec, device, workers):
        return video_gpu.Threads(Shifted(spec.dataset.read, 1), spec.size, device, workers)

    monkeypatch.setitem(video_gpu.ROWS, "torchcodec nvdec", made)
    with pytest.raises(ValueError, match=r"frames differ: frame .* of video"):
        video_gpu.open_row("torchcodec nvdec", given, CPU, 2)
    assert not [t for t in threading.enumerate() if t.name.startswith("nvdec")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four VP9 files, which DALI decodes on a CPU, too, and what was packed of them."""
    folder = tmp_path_factory.mktemp("videos")
    lines = ["path,label,split"]
    for k in range(4):
        write(folder / f"{k}.webm", "libvpx-vp9", count=20 + 3 * k, options={"deadline": "realtime", "cpu-used": "8"})
        lines.append(f"{k}.webm,{'ab'[k % 2]},train")
    (folder / "list.csv").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        dataset = open_dataset("videos", folder, decoder="pyav")
        pack_videos(dataset, folder / "x.beton", short_side=48, quality=90)
        yield dataset, open_dataset("beton", folder / "x.beton")


def test_videos_that_are_repeated_are_the_same_and_their_clips_others(files):
    given = video._parsed(["--device", "cpu", "--batch", "4"])
    for dataset in files:
        many = video._repeated(dataset, given)
        assert len(many) == 64 * 4 and (many.targets_N[4:8] == dataset.targets_N).all()
        one = np.array([2, 0])
        assert (many.read.frames(4 * 5 + 1, one) == dataset.read.frames(1, one)).all()
        assert (many.read.shape_N3[-4:] == dataset.read.shape_N3).all()
        todo = video_gpu.asked(spec(many), 0, np.array([1, 5, 9, 13]))
        assert len({tuple(frame_T) for frame_T in todo.frame_BT}) > 1
        for batch in served(spec(many, shuffle=False, size=40), 3):
            assert (batch.targets.numpy() == dataset.targets_N[batch.index.numpy() % 4]).all()


@pytest.mark.parametrize("name", ["dali nvdec", "packed nvjpeg"])
def test_dali_serves_the_loaders_clips(need, files, name):
    """On a CPU, nearly: its filter repeats pixels at a box's border where ours leaves them out, and its colours are its own."""
    need("dali")
    given = spec(files[name.startswith("packed")], batch=3)
    row = video_gpu.open_row(name, given, CPU, 1)
    row.batch()  # the small last batch of an epoch of 4
    for batch in served(given, 5)[2:]:
        todo, pixels = row.batch()
        assert (todo.index_B == batch.index.numpy()).all() and pixels.shape == batch.pixels.shape
        assert pixels.is_contiguous(memory_format=torch.channels_last_3d)
        assert (pixels.float() - batch.pixels.float()).abs().mean() < LARGEST_MEAN
    row.close()


def test_torchcodec_serves_the_loaders_clips(need, files):
    need("torchcodec")
    given = spec(files[0], batch=4)
    row = video_gpu.open_row("torchcodec nvdec", given, CPU, 2)
    assert torch.equal(row.batch()[1], served(given, 2)[1].pixels)
    row.close()


def simple_decoder(self, enc_file_path, gpu_id=0, cuda_context=0, cuda_stream=0, use_device_memory=True, max_width=0,
                   max_height=0, need_scanned_stream_metadata=0, decoder_cache_size=4, output_color_type="NATIVE",
                   bWaitForSessionWarmUp=False, enableDecodeStats=False):  # fmt: skip
    """What PyNvVideoCodec 2.2.4's SimpleDecoder is called with; its module cannot be imported without NVIDIA's driver."""


class FakeLibrary:
    """PyNvVideoCodec as ``PynvFrames`` uses it, by PyAV: frames of one path, each once, in the order in which they were asked."""

    OutputColorType = SimpleNamespace(NATIVE="nv12", RGB="rgb24")

    def __init__(self) -> None:
        self.opened = self.pointed = 0

    def SimpleDecoder(self, path, **given):
        inspect.signature(simple_decoder).bind(None, path, **given)
        self.opened += 1
        decoder = SimpleNamespace(path=path)

        def point(path):
            decoder.path, self.pointed = path, self.pointed + 1

        def frames(index_U):
            with av.open(decoder.path) as container:
                every = [f.to_ndarray(format=given["output_color_type"]) for f in container.decode(video=0)]
            return [every[i] for i in dict.fromkeys(index_U)]

        decoder.reconfigure_decoder, decoder.get_batch_frames_by_index = point, frames
        return decoder


@pytest.mark.parametrize("nv12", [False, True])
def test_pynvvideocodec_serves_the_loaders_clips(files, nv12):
    given, library = spec(files[0]), FakeLibrary()
    paths = video_gpu._paths(given)
    frames = video_gpu.PynvFrames(library, paths, given.dataset.read.shape_N3, nv12=nv12, gpu=0)
    repeated = np.array([4, 2, 4, 0])
    found, wanted = frames(1, repeated).numpy(), given.dataset.read.frames(1, repeated)
    assert found.shape == wanted.shape and np.abs(found.astype(int) - wanted).mean() < (1 if nv12 else 1e-9)
    row = threads_row(given, frames)
    assert not video_gpu.wrong_frames(given, *row.batch())
    row.close()
    assert library.opened <= 3 and library.pointed >= 2  # one for this thread, and two for the row's


def test_rows_are_told_apart_from_those_that_need_no_gpu(tmp_path, files, monkeypatch):
    """Asked for without a GPU they are not run; a budget that is used up ends the suite with what there is."""
    monkeypatch.setattr(video, "_TURN", 0.1)
    given = video._parsed(["--rows", "bare decode,packed nvjpeg,pyav", "--device", "cpu", "--clips", "4", "--batch", "4",
                           "--frames", "4", "--size", "24", "--workers", "1", "--repeats", "2"])  # fmt: skip
    one = video.Set("few", ("videos", tmp_path), files[1])
    monkeypatch.setattr(video.Set, "dataset", lambda self, decoder: files[0])
    not_run: dict[str, str] = {}
    rows = video._timed(one, given, not_run)
    assert [r["name"] for r in rows] == ["few bare decode", "few pyav"] and all(r["cores"] > 0 for r in rows)
    assert not_run == {"few packed nvjpeg": "ValueError: it needs a CUDA device"}
    assert video._timed(one, given, not_run, end=0.0) == []
    assert not_run["few pyav"] == "ValueError: --budget leaves no time for it"


def test_turns_fit_into_what_is_left():
    """Fewer before they are shorter than a second; one at least."""
    given = video._parsed(["--device", "cpu", "--batch", "32", "--workers", "16", "--repeats", "5"])
    assert video._ahead(given) == 3
    assert video._turns([0.1, 0.3], float("inf"), given) == (5, video._TURN)
    repeats, turn = video._turns([0.1, 0.3], 30.0, given)
    assert repeats == 5 and turn == pytest.approx(2.0) and repeats * (2 * turn + 5 * 0.4) <= 30.0
    assert video._turns([0.1, 0.3], 12.0, given) == (3, 1.0)
    assert video._turns([0.1, 0.3], 0.0, given) == (1, 1.0)
