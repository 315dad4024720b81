"""The video loader serves what the plans say, whoever makes it, from wherever it begins, and replaces what is damaged."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from fasttrain.loaders import ClipPlan, LoaderSpec, ViewPlan, choose_loader, evaluation, open_dataset, open_loader
from fasttrain.loaders.crop import cut_one
from fasttrain.loaders.pack_video import pack_videos

from .memory_clips import videos
from .videos import write

SHAPES = [
    (30, 40, 50),
    (9, 33, 60),
    (50, 48, 36),
    (4, 40, 40),
    (70, 45, 31),
    (22, 40, 50),
    (31, 40, 50),
    (12, 90, 50),
] * 2
PLAN = ViewPlan("corner")


def spec(dataset, **changes) -> LoaderSpec:
    values = {"index_N": np.arange(len(dataset)), "plan": PLAN, "size": 24, "stored": 0, "batch": 5, "still": 40}
    return LoaderSpec(dataset, **values | {"clip": ClipPlan(6, 2), "seed": 3, "view_seed": 4} | changes)


def epochs(given: LoaderSpec, count: int = 2, workers: int = 2) -> list:
    loader = open_loader("video", given, workers=workers)
    try:
        return [b for _ in range(count) for b in loader]
    finally:
        loader.close()


def same(ours, theirs) -> bool:
    fields = ("pixels", "targets", "index", "view", "still")
    return len(ours) == len(theirs) and all(
        torch.equal(getattr(a, f), getattr(b, f)) for a, b in zip(ours, theirs, strict=True) for f in fields
    )


def test_a_batch_is_what_the_plans_say():
    dataset = videos(SHAPES)
    given = spec(dataset)
    batches = epochs(given)
    assert [b.index.tolist() for b in batches[:4]] == [
        part.tolist() for part in np.array_split(given.epoch_order(0), [5, 10, 15])
    ]
    for batch, epoch in zip(batches, [0] * 4 + [1] * 4, strict=True):
        assert batch.pixels.shape[1:] == (3, 6, 24, 24) and batch.still.shape[1:] == (3, 40, 40)
        assert batch.pixels.is_contiguous(memory_format=torch.channels_last_3d)
        assert (batch.view == epoch).all() and (batch.where_B2 == np.stack([batch.index, batch.view], axis=1)).all()
        for b, index in enumerate(batch.index.tolist()):
            frame_THWC = dataset.read.videos[index]
            count, height, width, _ = frame_THWC.shape
            one = np.array([index])
            frame_T = given.clip(seed=4, number_B=np.array([epoch]), index_B=one, count_B=np.array([count]))[0]
            view = PLAN(seed=4, epoch=epoch, index_B=one, height_B=height, width_B=width)
            wanted_TSSC, still = np.empty((6, 24, 24, 3), np.uint8), np.empty((40, 40, 3), np.uint8)
            for t, frame in enumerate(frame_T.tolist()):
                cut_one(frame_THWC[frame], view, 0, wanted_TSSC[t])
            cut_one(frame_THWC[frame_T[3]], view, 0, still)  # f_s: the centre frame
            assert (batch.pixels[b].permute(1, 2, 3, 0).numpy() == wanted_TSSC).all()
            assert (batch.still[b].permute(1, 2, 0).numpy() == still).all()


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_nothing(workers):
    dataset = videos(SHAPES)
    assert same(epochs(spec(dataset)), epochs(spec(dataset), workers=workers))


@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_it_goes_on_inside_an_epoch(at):
    given = spec(videos(SHAPES))
    whole = epochs(given)
    first = open_loader("video", given, workers=2)
    walk = itertools.chain(first, first)
    for _ in range(at):
        next(walk)
    state = first.state_dict()
    first.close()
    second = open_loader("video", given, workers=1)
    second.load_state_dict(state)
    rest = [b for _ in range(2 - state["epoch"]) for b in second]
    second.close()
    assert same(rest, whole[at:])


def test_ranks_share_a_batch():
    given = spec(videos(SHAPES))
    parts = [epochs(replace(given, rank=rank, ranks=2), 1) for rank in (0, 1)]
    for whole, left, right in zip(epochs(given, 1), *parts, strict=True):
        assert torch.equal(whole.pixels, torch.cat([left.pixels, right.pixels]))


def test_evaluation_shows_each_video_in_all_its_clips_and_crops():
    dataset = videos(SHAPES)
    given = spec(dataset, plan=evaluation(), clip=ClipPlan(6, 1, 2, 3), shuffle=False, still=0)
    batches = epochs(given, 1)
    assert len(open_loader("video", given)) == len(batches) == -(-16 * 6 // 5)
    index, view = (torch.cat([getattr(b, name) for b in batches]) for name in ("index", "view"))
    assert index.tolist() == np.repeat(np.arange(16), 6).tolist()
    assert view.tolist() == list(range(6)) * 16
    pixels = torch.cat([b.pixels for b in batches])
    assert not torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[3])
    assert torch.equal(pixels[18], pixels[21])  # a video of 4 frames begins its two clips at the same frame


def test_a_damaged_video_is_named():
    for broken, frame in (({6: -1}, "it is broken"), ({6: 3}, "frame 3 is damaged")):
        with pytest.raises(ValueError, match=f"cannot read the video video6: {frame}"):
            epochs(spec(videos(SHAPES, broken)), 3)


def test_a_damaged_video_is_replaced_by_the_next_that_can_be_read():
    broken = {6: -1, 7: 0, 15: -1}
    dataset = videos(SHAPES, broken)
    given = spec(dataset, on_bad_sample="skip")
    loader = open_loader("video", given, workers=2)
    found = list(loader)
    assert set(loader.bad) == set(broken) and "video7" in loader.bad[7]
    loader.close()
    wanted = [{6: 8, 7: 8, 15: 0}.get(i, i) for i in given.epoch_order(0).tolist()]
    assert [i for b in found for i in b.index.tolist()] == wanted
    assert same(found, epochs(given, 1, workers=3))
    batch = next(b for b in found if 8 in b.index.tolist())
    assert batch.targets.tolist() == dataset.targets_N[batch.index.numpy()].tolist()
    both = [b.pixels[b.index == 8] for b in found if (b.index == 8).any()]
    assert torch.cat(both).unique(dim=0).shape[0] == 1  # its own view, as often as it is shown in the epoch


def test_all_videos_damaged():
    with pytest.raises(ValueError, match="in a row cannot be read"):
        epochs(spec(videos(SHAPES, dict.fromkeys(range(16), -1)), on_bad_sample="skip"))


def test_a_loader_that_is_left_ends_its_threads():
    import threading

    before = threading.active_count()
    loader = open_loader("video", spec(videos(SHAPES)), workers=3)
    next(iter(loader))
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before


def test_what_cannot_be_served_is_refused():
    dataset = videos(SHAPES)
    with pytest.raises(ValueError, match=r"data\.loader: torch serves images"):
        open_loader("torch", spec(dataset))
    with pytest.raises(ValueError, match=r"data\.loader: video serves clips"):
        open_loader("video", spec(dataset, clip=None))
    with pytest.raises(ValueError, match=r"data\.stored"):
        open_loader("video", spec(dataset, stored=32))


def test_synthetic_clips_have_the_same_shape():
    batch = next(iter(open_loader("synthetic", spec(videos(SHAPES)))))
    assert batch.pixels.shape == (5, 3, 6, 24, 24) and batch.pixels.is_contiguous(memory_format=torch.channels_last_3d)
    assert batch.images.shape == (5, 3, 24, 24) and not torch.equal(batch.pixels[:, :, 0], batch.pixels[:, :, 1])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two each of H.264 with B-frames, xvid in AVI, and MPEG-4 with B-frames in AVI (which PyAV reads for all)."""
    folder = tmp_path_factory.mktemp("videos")
    kinds = {"long.mp4": ("libx264", {"g": "250"}), "xvid.avi": ("mpeg4", {"g": "12", "bf": "0"})}
    kinds |= {"packed.avi": ("mpeg4", {"g": "12", "bf": "2"})}
    lines = ["path,label,split"]
    for name, (codec, options) in kinds.items():
        for k in range(2):
            write(folder / f"{k}{name}", codec, count=30 + 5 * k, options=options)
            lines.append(f"{k}{name},{name[0]},{('train', 'test')[k]}")
    (folder / "list.csv").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
def test_decoders_serve_the_same_clips(files, need, decoder):
    """Byte for byte, the stills too: 8-bit 4:2:0 of even size."""
    need(decoder)
    ours, theirs = (epochs(spec(open_dataset("videos", files, decoder=name), still=64)) for name in (decoder, "pyav"))
    assert same(ours, theirs)


def test_a_packed_file_serves_the_same_clips(files, tmp_path):
    """Frames, boxes, flips and order are those of the files; pixels are JPEGs' (here not made smaller)."""
    pack_videos(open_dataset("videos", files), tmp_path / "x.beton", short_side=0, quality=98)
    ours = epochs(spec(open_dataset("beton", tmp_path / "x.beton")))
    theirs = epochs(spec(open_dataset("videos", files)))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.where_B2 == b.where_B2).all() and torch.equal(a.targets, b.targets)
        assert (a.pixels.float() - b.pixels.float()).abs().mean() < 3
        assert (a.still.float() - b.still.float()).abs().mean() < 3


def test_a_damaged_frame_of_a_packed_file_is_named(files, tmp_path):
    out = tmp_path / "x.beton"
    pack_videos(open_dataset("videos", files), out, short_side=0)
    dataset = open_dataset("beton", out)
    at = int(dataset.read.packed.file.ptr_N[int(dataset.read.first_V[1]) + 3])
    with out.open("r+b") as file:
        file.seek(at)
        file.write(bytes(200))
    damaged = open_dataset("beton", out)
    begins_at_0 = spec(damaged, plan=evaluation(), clip=ClipPlan(6, 1, 2), still=0)
    with pytest.raises(ValueError, match=r"x\.beton, video 1 .*frame 3 is damaged"):
        epochs(begins_at_0, 1)


def test_the_choice_of_a_loader(files, tmp_path):
    """Clips come from one loader; only files of videos get the hint to pack them. Middle frames are images of one size or not."""
    assert choose_loader(spec(videos(SHAPES))) == ("video", "clips")
    assert choose_loader(spec(open_dataset("videos", files)))[1].endswith(
        "`fasttrain pack` makes a file that loads faster"
    )
    still = {"clip": None, "plan": evaluation(), "still": 0}
    assert choose_loader(spec(videos(SHAPES), **still))[0] == "torch"
    assert choose_loader(spec(videos([(9, 40, 50)] * 8), **still))[0] == "resident"
    loader = open_loader("torch", spec(videos(SHAPES), **still, shuffle=False, batch=16))
    (batch,) = loader
    view = evaluation().numbered(0, np.zeros(1), np.zeros(1), 48, 36)
    wanted = np.empty((24, 24, 3), np.uint8)
    cut_one(videos(SHAPES).read.videos[2][25], view, 0, wanted)  # the middle of 50 frames
    assert (batch.pixels[2].permute(1, 2, 0).numpy() == wanted).all()
