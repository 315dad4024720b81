"""On a CUDA device: clips from files and packed files arrive whole and in order, are gone on with and learned from, and what
NVDEC and nvJPEG decode for `bench video` are the frames that PyAV decodes.

What is tested takes the device as an argument, and so can be tried on a CPU.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain.benchmarks import video_gpu
from fasttrain.loaders import ClipPlan, Dataset, LoaderSpec, ViewPlan, open_dataset, open_loader
from fasttrain.loaders.pack_video import pack_videos

from fasttrain.build import build
from fasttrain.compare import jobs_of
from fasttrain.log import read_lines
from fasttrain.recipe import load
from fasttrain.trainer import Trainer
from tests.loaders.videos import number_of, write

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
KINDS = {
    "long.mp4": ("libx264", {"g": "250"}),  # B-frames
    "short.mp4": ("libx264", {"g": "8", "bf": "0"}),
    "xvid.avi": ("mpeg4", {"g": "12", "bf": "0"}),  # as UCF101's
}
SIDE = 172  # pixels, of square frames: not a multiple of 16, so that what is decoded is more than what is shown
SOURCES = "[{name: a, model: test_resnet, weights: random, size: 32}]"


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Dataset]:
    """Four videos of each kind, read by PyAV, and all of them packed."""
    root = tmp_path_factory.mktemp("videos")
    out: dict[str, Dataset] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        every = []
        for kind, (codec, options) in KINDS.items():
            lines = []
            for k in range(4):
                name = f"{k}{kind}"
                write(root / name, codec, count=30 + 5 * k, options=options, width=SIDE, height=SIDE)
                lines.append(f"{name},{'ab'[k % 2]},train")
            (root / f"{kind}.csv").write_text("\n".join(["path,label,split", *lines]))
            out[kind] = open_dataset("videos", root / f"{kind}.csv", decoder="pyav")
            every += lines
        (root / "all.csv").write_text("\n".join(["path,label,split", *every]))
        out["files"] = open_dataset("videos", root / "all.csv", decoder="pyav")
        pack_videos(out["files"], root / "x.beton", short_side=96, quality=90)
        out["packed"] = open_dataset("beton", root / "x.beton")
        assert all(len(d.read.shape_N3) for d in out.values())  # looked through, while the cache is the test's
        yield out


def spec(dataset: Dataset, **changes) -> LoaderSpec:
    values = {"index_N": np.arange(len(dataset)), "plan": ViewPlan("corner"), "size": 48, "stored": 0, "batch": 5}
    return LoaderSpec(dataset, **values | {"clip": ClipPlan(6, 2), "seed": 3, "view_seed": 4, "still": 64} | changes)


def epochs(given: LoaderSpec, device: torch.device, count: int = 3, workers: int = 4) -> list:
    loader = open_loader("video", given, device, workers)
    try:
        return [batch for _ in range(count) for batch in loader]
    finally:
        loader.close()


def busy(device: torch.device) -> torch.Tensor:
    """Milliseconds of work, queued."""
    work = torch.ones(2048 if device.type == "cuda" else 64, device=device).diag()
    for _ in range(50):
        work = work @ work
    return work


def assert_same(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in ("pixels", "still", "targets", "index", "view"):
            assert torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()), name
        assert (a.where_B2 == b.where_B2).all()


@pytest.mark.parametrize("name", ["files", "packed"])
def test_batches_that_are_held_stay_what_they_were(device, sets, name):
    """The CPU's bytes, though the device is busy when they are copied, and looked at only when all are there."""
    given = spec(sets[name])
    loader, held = open_loader("video", given, device, 4), []
    for _ in range(3):
        for batch in loader:
            busy(device)
            held.append(batch)
    loader.close()
    assert held[0].pixels.device.type == device.type
    assert held[0].pixels.is_contiguous(memory_format=torch.channels_last_3d)
    assert_same(held, epochs(given, torch.device("cpu")))


@pytest.mark.parametrize("name", ["files", "packed"])
def test_memory_is_not_taken_back_before_it_is_read(device, sets, name):
    """Each batch is let go while the work that reads it still waits in its stream."""
    given = spec(sets[name])
    wanted = [(b.pixels.long().sum().item(), b.still.long().sum().item()) for b in epochs(given, torch.device("cpu"))]
    side = torch.cuda.Stream() if device.type == "cuda" else None
    found = []
    with torch.cuda.stream(side):  # the loader serves whatever stream is current
        loader = open_loader("video", given, device, 4)
        for _ in range(3):
            for batch in loader:
                work = busy(device)
                found.append(((batch.pixels.long() * work[0, 0].long()).sum(), batch.still.long().sum()))
                del batch
        loader.close()
    if side is not None:
        side.synchronize()
    assert [(a.item(), b.item()) for a, b in found] == wanted


@pytest.mark.parametrize("at", [1, 2, 4])
def test_it_goes_on_inside_an_epoch(device, sets, at):
    given = spec(sets["packed"])
    whole = epochs(given, device, 2)
    first = open_loader("video", given, device, 4)
    walk = itertools.chain(first, first)
    for _ in range(at):
        next(walk)
    state = first.state_dict()
    first.close()
    second = open_loader("video", given, device, 2)
    second.load_state_dict(state)
    rest = [batch for _ in range(2 - state["epoch"]) for batch in second]
    second.close()
    assert_same(rest, whole[at:])


def packed_recipe(root: Path, *overrides: str):
    """Six motions, packed; a few steps an epoch on small clips, with a source."""
    file = root / "motion.beton"
    if not file.exists():
        pack_videos(open_dataset("motion"), file, short_side=0, quality=95)
    given = ["--data.name", "beton", "--data.root", str(file), "--data.labelled", "96", "--data.batch", "16"]
    given += ["--data.views", "2", "--method.name", "sskt", "--sources", SOURCES, "--transfer.still", "40"]
    given += ["--run.dir", str(root / "runs"), "--run.tensorboard", "false", "--run.log_every", "1"]
    recipe = load("motion", [*given, *overrides])
    recipe.rows = {}
    return recipe


def fit(recipe, stop_at: int = 0) -> Path:
    """``stop_at``: interrupted after so many lines of its log."""
    (job,) = jobs_of(recipe)
    count = itertools.count(1)

    def watch(line) -> None:
        if next(count) == stop_at:
            raise KeyboardInterrupt

    Trainer(build(job.recipe), job.folder, Path(recipe.run.dir) / recipe.name / "recall", watch).fit()
    return job.folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder, "step")]


def test_recalled_sources_teach_clips_like_live_ones(device, tmp_path):
    """In float32, two epochs of met labels and two of recalled ones: the same losses but for the order of sums."""
    common = ("--run.device", str(device), "--run.precision", "fp32", "--run.compile", "false", "--optim.epochs", "4")
    common += ("--transfer.precision", "fp16" if device.type == "cuda" else "fp32", "--optim.lr", "0.01")
    curves = []
    for recall in ("false", "true"):
        folder = fit(packed_recipe(tmp_path, *common, "--transfer.recall", recall, "--name", f"recall-{recall}"))
        curves.append(losses(folder))
    assert len(curves[0]) == 4 * 6 and np.isfinite(curves[0]).all()
    assert curves[1] == pytest.approx(curves[0], rel=0.03)
    assert any((tmp_path / "runs/recall-true/recall").iterdir())


def test_a_training_on_clips_goes_on_inside_an_epoch(device, tmp_path):
    common = ("--run.device", str(device), "--optim.epochs", "2", "--run.checkpoint_steps", "2", "--optim.lr", "0.01")
    whole = fit(packed_recipe(tmp_path, *common, "--run.compile", "false", "--name", "whole"))
    stopped = packed_recipe(tmp_path, *common, "--run.compile", "false", "--name", "stopped")
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, stop_at=4)
    folder = fit(stopped)
    assert [line["step"] for line in read_lines(folder, "step")] == [line["step"] for line in read_lines(whole, "step")]
    assert losses(folder) == pytest.approx(losses(whole), rel=0.05)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 12


PARTS = {
    "dali nvdec": "dali",
    "torchcodec nvdec": "torchcodec",
}  # that rows of the benchmark need; PyNvVideoCodec is the rest's


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in video_gpu.ROWS if not name.startswith("packed")])
def test_nvdec_decodes_the_frames_that_pyav_decodes(device, sets, need, name, kind):
    """Each frame of each video by its number, which is written into it, out of order; and nearly PyAV's colours."""
    need(PARTS.get(name, "pynvvideocodec"))
    dataset = sets[kind]
    given = spec(dataset, plan=ViewPlan("centre", flip="none"), size=SIDE, batch=4)
    maker = video_gpu.ROWS[name](given, device, 4)
    count, rng = int(dataset.read.shape_N3[:, 0].min()), np.random.default_rng(0)
    first = video_gpu.asked(given, 0, np.arange(4))
    for _ in range(4):
        frame_BT = np.stack([rng.permutation(count)[:6] for _ in range(4)])
        todo = video_gpu.Asked(first.index_B, frame_BT, first.view)
        pixels = maker.take(todo, maker.begin(todo))
        assert pixels.device.type == device.type
        shown = pixels.permute(0, 2, 3, 4, 1).cpu().numpy()
        assert [[number_of(f) for f in clip] for clip in shown] == frame_BT.tolist()
        wanted = np.stack([dataset.read.frames(v, frame_T) for v, frame_T in enumerate(frame_BT)])
        assert np.abs(shown - wanted.astype(int)).mean() < video_gpu.LARGEST_MEAN
        assert not video_gpu.wrong_frames(given, todo, pixels)
    maker.close()


def test_rows_of_the_benchmark_serve_the_loaders_clips(device, sets, need):
    """In order and at once, with batches ahead: DALI's JPEG frames beside our decoder's."""
    need("dali")
    given = spec(sets["packed"], still=0)
    row = video_gpu.open_row("packed nvjpeg", given, device, 4)
    for batch in epochs(given, torch.device("cpu"), 3)[1:]:
        todo, pixels = row.batch()
        assert (todo.index_B == batch.index.numpy()).all()
        assert pixels.device.type == device.type and pixels.is_contiguous(memory_format=torch.channels_last_3d)
        assert (pixels.cpu().float() - batch.pixels.float()).abs().mean() < video_gpu.LARGEST_MEAN
    row.close()
