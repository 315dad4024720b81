"""The dali loader serves the batches of the torch loader: indices, labels and views exactly, pixels nearly.

Pixels are compared by the mean absolute difference of all bytes of an epoch, of 255. On a CPU both decode to the same
bytes, and what is left, 0.15 to 0.35 on photographs, is the rounding of our filter and the pixels at a box's border. What a
GPU serves: tests/gpu/test_loaders.py.
"""

import gc
import os
import signal
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from fasttrain.loaders import (
    Growth,
    LoaderSpec,
    TorchLoader,
    ViewPlan,
    dali_loader,
    evaluation,
    open_dataset,
    open_loader,
)
from fasttrain.loaders.base import read_or_stand_in
from fasttrain.loaders.dali_loader import CROP, PIXELS, WHOLE, DaliLoader
from fasttrain.loaders.pack import pack
from PIL import Image

_MEAN = 0.5  # of 255, on a CPU


@pytest.fixture(autouse=True)
def _need_dali(need):
    need("dali")


def photograph(rng: np.random.Generator, photos: list[np.ndarray]) -> Image.Image:
    """A part of one of two photographs, 60 to 200 pixels a side."""
    height, width = (int(n) for n in rng.integers(60, 200, 2))
    photo = photos[rng.integers(len(photos))]
    top, left = (int(rng.integers(photo.shape[a] - 2 * n)) for a, n in enumerate((height, width)))
    return Image.fromarray(photo[top : top + 2 * height, left : left + 2 * width]).resize((width, height))


@pytest.fixture(scope="module")
def photos():
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


@pytest.fixture(scope="module")
def tree(tmp_path_factory, photos):
    """30 photographs of many sizes, JPEGs (4:2:0, quality 90) and every fifth a PNG."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(30):
        path = root / ("a" if i < 14 else "b") / f"{i:02}{'.png' if i % 5 == 4 else '.jpg'}"
        path.parent.mkdir(exist_ok=True)
        photograph(rng, photos).save(path, **({} if path.suffix == ".png" else {"quality": 90}))
    return open_dataset("folder", root)


def spec_of(dataset, **changes) -> LoaderSpec:
    plan = ViewPlan(crop="random_resized", flip="both")
    base = LoaderSpec(dataset, np.arange(len(dataset)), plan, size=48, stored=0, batch=7, seed=5, view_seed=9)
    return replace(base, **changes)


def compare(ours, theirs, most: float = _MEAN) -> None:
    """Two lists of batches: everything but the pixels exactly, and these in the mean."""
    assert len(ours) == len(theirs)
    differences = []
    for a, b in zip(ours, theirs, strict=True):
        for name in ("targets", "index", "view"):
            assert torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()), name
        for name in ("pixels", "still"):
            first, second = getattr(a, name), getattr(b, name)
            assert (first is None) == (second is None)
            if first is not None:
                assert first.shape == second.shape and first.dtype == torch.uint8
                assert first.is_contiguous(memory_format=torch.channels_last)
                differences.append((first.cpu().int() - second.cpu().int()).abs().flatten())
    assert torch.cat(differences).float().mean() < most


def equal(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True))


def dali_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("dali")]


CHANGES = {
    "batches of 1": {"batch": 1, "index_N": np.arange(5)},
    "one batch": {"batch": 30},
    "drop last": {"drop_last": True},
    "still": {"still": 80},
    "enlarged": {"size": 224, "batch": 16, "index_N": np.arange(16)},
    "centre": {"plan": evaluation(0.875), "shuffle": False},
    "views": {"plan": ViewPlan(crop="random_resized", views=1, min_area=0.35)},
    "pad": {"plan": ViewPlan(crop="pad", pad=20, flip="both")},
    "growth": {"growth": Growth(16, 0, 2, step=8)},
    "balance": {"balance": True},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_the_batches_of_the_torch_loader(tree, changes):
    spec = spec_of(tree, **changes)
    loader, again, reference = DaliLoader(spec, workers=2), DaliLoader(spec, workers=1), TorchLoader(spec)
    for epoch in range(2):
        ours = list(loader)
        assert ours[0].pixels.shape[2] == spec.size_at(epoch)
        compare(ours, list(reference))
        assert equal(ours, list(again))
    for one in (loader, again):
        one.close()


@pytest.mark.parametrize("batch", [7, 29])
def test_ranks_share_the_same_global_batches(tree, batch):
    """With 29 a batch, the last one holds a single sample: nothing for two of three ranks."""
    spec = spec_of(tree, batch=batch, still=32)
    whole = list(DaliLoader(spec, workers=1))
    parts = [list(DaliLoader(replace(spec, rank=r, ranks=3), workers=1)) for r in range(3)]
    for b, batch_of_all in enumerate(whole):
        for name in ("index", "targets", "view", "pixels", "still"):
            assert torch.equal(torch.cat([getattr(p[b], name) for p in parts]), getattr(batch_of_all, name)), name


def test_going_on_in_mid_epoch(tree):
    """The position is that of the batches which were served, however far DALI is ahead."""
    loader, rest = DaliLoader(spec_of(tree), workers=1), DaliLoader(spec_of(tree), workers=1)
    loader.set_epoch(3)
    states, whole = [loader.state_dict()], []
    for batch in loader:
        whole.append(batch)
        states.append(loader.state_dict())
    assert [s["batch"] for s in states[:5]] == [0, 1, 2, 3, 4]
    for at in range(5):
        rest.load_state_dict(states[at])
        assert equal(list(rest), whole[at:])
    assert rest.state_dict() == loader.state_dict() == {"epoch": 4, "batch": 0}


@pytest.fixture
def odd_tree(tmp_path, photos):
    """What DALI decodes in another way or not at all, among photographs."""
    rng = np.random.default_rng(1)
    for label in "ab":
        (tmp_path / label).mkdir()
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        photograph(rng, photos).save(tmp_path / f"a/turned{turn}.jpg", exif=exif, quality=90)
    exif[0x0112] = 6
    photograph(rng, photos).save(tmp_path / "b/turned.png", exif=exif)
    photograph(rng, photos).convert("CMYK").save(tmp_path / "b/cmyk.jpg")
    photograph(rng, photos).convert("L").save(tmp_path / "b/grey.jpg")
    photograph(rng, photos).save(tmp_path / "b/progressive.jpg", progressive=True)
    photograph(rng, photos).convert("P").save(tmp_path / "b/palette.png")
    photograph(rng, photos).convert("RGBA").save(tmp_path / "b/alpha.png")
    photograph(rng, photos).save(tmp_path / "b/picture.gif")
    photograph(rng, photos).save(tmp_path / "b/picture.webp")
    deep = np.asarray(photograph(rng, photos).convert("L")).astype(np.uint16) * 256 + 200
    Image.fromarray(deep).save(tmp_path / "b/deep.png")
    return tmp_path


@pytest.mark.parametrize("crop", ["random_resized", "pad"])
def test_files_of_every_kind(odd_tree, crop):
    dataset = open_dataset("folder", odd_tree)
    spec = spec_of(dataset, plan=ViewPlan(crop=crop, flip="both"), batch=1, shuffle=False)
    loader = DaliLoader(spec, workers=1)
    for _ in range(2):
        ours = list(loader)
        loader.set_epoch(0)
        for a, b in zip(ours, TorchLoader(spec), strict=True):
            compare([a], [b], 2 * _MEAN)
    assert len(loader._ours) == 5  # the turned PNG, CMYK, GIF, WebP, 16 bits


def test_a_file_that_dali_refuses_is_decoded_by_us(odd_tree, monkeypatch):
    monkeypatch.setattr(dali_loader, "plain_size", lambda content: (60, 60))
    dataset = open_dataset("folder", odd_tree)
    gif = next(i for i in range(len(dataset)) if dataset.read.name(i).endswith("gif"))
    index_N = np.array([gif, *(i for i in range(8) if i != gif)])
    spec = spec_of(dataset, index_N=index_N, batch=3, plan=evaluation(0.5))
    loader = DaliLoader(spec, workers=1)
    served = torch.cat([b.index for b in loader])
    assert sorted(served.tolist()) == sorted(index_N.tolist())
    assert loader._ours == {gif} and not loader.bad


def damage(root) -> None:
    """A JPEG with a header that is none, one that was cut off, a PNG with other bytes in its data."""
    (root / "a/03.jpg").write_bytes(b"\xff\xd8 no image")
    jpeg, png = root / "b/20.jpg", root / "b/14.png"
    jpeg.write_bytes(jpeg.read_bytes()[:-300])
    content = bytearray(png.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    png.write_bytes(content)


@pytest.fixture
def damaged(tree, tmp_path):
    """The photographs, three of them damaged."""
    for i in range(len(tree)):
        path = tree.read.paths[i]
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    return open_dataset("folder", tmp_path)


def test_a_damaged_file_is_named_where_it_would_have_been_served(damaged):
    spec = spec_of(damaged, batch=3)
    ours, theirs = [], []
    loader = DaliLoader(spec, workers=1)
    for served, one in ((ours, loader), (theirs, TorchLoader(spec))):
        with pytest.raises(ValueError, match=r"^cannot read the image .*/[ab]/\d\d\.") as error:
            for batch in one:
                served.append((batch.index.tolist(), one.state_dict()))
        served.append(str(error.value))
    assert ours == theirs
    assert len(ours) > 2
    with pytest.raises(ValueError, match=r"^cannot read"):
        list(loader)
    for index in (3, 14, 20):
        with pytest.raises(ValueError, match=f"/{index:02}.*: ") as error:
            list(DaliLoader(replace(spec, index_N=np.array([1, 2, index])), workers=1))
        with pytest.raises(ValueError) as same:
            damaged.read(index)
        assert str(error.value) == str(same.value)
    assert not dali_threads()


def test_stand_ins_are_those_of_the_torch_loader(damaged):
    spec = spec_of(damaged, on_bad_sample="skip", batch=6, still=20)
    loader, reference = DaliLoader(spec, workers=2), TorchLoader(spec)
    for _ in range(2):
        compare(list(loader), list(reference))
    assert loader.bad == reference.bad and len(loader.bad) == 3
    for index, why in loader.bad.items():
        stand_in, _, bad = read_or_stand_in(spec, index)
        assert stand_in != index and bad[index] == why


def test_an_iteration_that_is_given_up(tree):
    loader = DaliLoader(spec_of(tree, batch=2), workers=1)
    whole = list(loader)
    loader.set_epoch(0)
    for batch in loader:
        assert equal([batch], whole[:1])
        break
    assert not dali_threads()
    assert equal(list(loader), whole[1:])
    loader.set_epoch(0)
    first, second = iter(loader), iter(loader)
    next(first), next(second)
    with pytest.raises(RuntimeError, match="anew"):
        next(first)
    loader.set_epoch(0)
    assert equal(list(loader), whole)


def test_ctrl_c(tree):
    loader = DaliLoader(spec_of(tree, batch=1), workers=1)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run side by side it is another
    try:
        with pytest.raises(KeyboardInterrupt):
            for i, _ in enumerate(loader):
                if i == 3:
                    signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not dali_threads()
    assert len(list(loader)) == 26


def wait_for_threads(most: int) -> int:
    """The process's threads, DALI's own too, after at most a second: the system counts one that has just ended."""
    for _ in range(20):
        count = len(os.listdir("/proc/self/task"))
        if count <= most:
            break
        time.sleep(0.05)
    return count


def test_no_thread_is_left(tree):
    gc.collect()
    time.sleep(0.2)
    before = len(os.listdir("/proc/self/task"))
    loader = DaliLoader(spec_of(tree, batch=2), workers=3)
    held = iter(loader)
    next(held)
    assert len(os.listdir("/proc/self/task")) > before + 3
    loader.close()
    loader.close()
    assert wait_for_threads(before) <= before
    with pytest.raises(RuntimeError, match="closed"):
        next(held)


def test_batches_stay_valid(tree):
    loader = DaliLoader(spec_of(tree, batch=3), workers=1)
    copies = [b.pixels.clone() for b in loader]
    loader.set_epoch(0)
    held = list(loader)
    loader.close()
    assert all(torch.equal(a, b.pixels) for a, b in zip(copies, held, strict=True))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("crop", ["random_resized", "pad"])
def test_packed_data_sets(tree, tmp_path, raw, crop):
    pack(tree, tmp_path / "packed.beton", raw=raw, workers=1)
    packed = open_dataset("beton", tmp_path / "packed.beton")
    spec = spec_of(packed, plan=ViewPlan(crop=crop, flip="both"), still=40)
    loader = DaliLoader(spec, workers=1)
    compare(list(loader), list(TorchLoader(spec)))
    how = PIXELS if raw else WHOLE if crop == "pad" else CROP
    assert loader.describe().endswith(f"on cpu, 1 threads, {how}") and loader.describe().startswith("dali 2.")


def test_a_packed_data_set_of_jpegs_and_pixels(tree, tmp_path):
    pack(tree, tmp_path / "packed.beton", workers=1)
    packed = open_dataset("beton", tmp_path / "packed.beton")
    packed.read.raw_N[:4] = True
    with pytest.raises(ValueError, match=r"26 samples as JPEGs and 4 as pixels: use the torch loader"):
        DaliLoader(spec_of(packed))
    assert DaliLoader(spec_of(packed, index_N=np.arange(4)))._how == PIXELS


def test_a_packed_jpeg_whose_size_is_not_that_of_its_record(tree, tmp_path):
    pack(tree, tmp_path / "packed.beton", workers=1)
    packed = open_dataset("beton", tmp_path / "packed.beton")
    packed.read.file.height_N[5] += 200
    spec = spec_of(packed, plan=evaluation(1.0))
    packed.read.file.width_N[5] += 200
    with pytest.raises(ValueError, match="sample 5: its size is not that of its record"):
        list(DaliLoader(spec, workers=1))


def test_what_cannot_be_served(tree, monkeypatch):
    with pytest.raises(ValueError, match=r"^data\.stored: .* --square 32, or use the torch loader"):
        open_loader("dali", spec_of(tree, stored=32))
    toy = open_dataset("toy", tree.read.paths[0])
    with pytest.raises(ValueError, match=r"^data\.loader: dali decodes image files; toy holds pixels: use resident"):
        open_loader("dali", spec_of(toy))
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"^data\.loader: dali needs nvidia-dali-cuda130 .*: pip install"):
        open_loader("dali", spec_of(tree))


@pytest.mark.parametrize("how", [WHOLE, CROP, PIXELS])
def test_the_graph_for_a_gpu(tree, how):
    """Of the code that runs on the CPU; without a GPU it can be put together, and not be built."""
    from nvidia.dali import Pipeline

    pipe = Pipeline(batch_size=8, num_threads=1, device_id=0)
    with pipe:
        decoder = {"device": "mixed", "hw_decoder_load": 0.5, "jpeg_fancy_upsampling": True}
        nodes = dali_loader.graph(spec_of(tree, still=64), how, 0, decoder)
    assert [n.device for n in nodes] == ["gpu", "gpu"]


@pytest.mark.parametrize(
    ("version", "crops"), [("0.9.0", False), ("0.9.0.20", False), ("0.9.1", True), ("0.10.0.3", True)]
)
def test_which_decoders_cut_on_a_gpu(tree, monkeypatch, version, crops):
    from types import SimpleNamespace

    installed = [SimpleNamespace(metadata={"Name": "nvidia-nvimgcodec-cu13"}, version=version)]
    monkeypatch.setattr(dali_loader.importlib.metadata, "distributions", lambda: installed)
    assert dali_loader.gpu_decodes_crops() is crops
    assert dali_loader._how(spec_of(tree), 0) == (CROP if crops else WHOLE)
    assert dali_loader._how(spec_of(tree), 0, not crops) == (WHOLE if crops else CROP)
    assert dali_loader._how(spec_of(tree), None) == CROP
