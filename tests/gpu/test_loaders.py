"""On a CUDA device: what the image loaders serve there is what the torch loader serves on the CPU.

Indices, labels, views and order exactly; the bytes, too, where the CPU decodes (resident, ffcv, torch). nvJPEG is another
decoder than libjpeg: it may repeat chroma samples where libjpeg interpolates between them, and round differently. How far apart
a crop may be for that is computed here, for each crop (``allowed``). All over, the mean difference is below 3 of 255.

What is tested takes the device as an argument, and so can be tried on a CPU, where DALI decodes with libjpeg-turbo.
"""

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain.loaders import (
    Batch,
    Dataset,
    EpochLoader,
    Growth,
    LoaderSpec,
    Puzzle,
    ViewPlan,
    evaluation,
    open_dataset,
    open_loader,
)
from fasttrain.loaders.pack import pack
from fasttrain.loaders.resample import cut
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MEAN = 3.0  # of 255, over all that a loader serves
ROUNDING = 1.0  # of 255: two decoders' inverse DCT and colours, each rounded to whole numbers
SHARES = [0.0, 0.65, 1.0]  # of the JPEG engine
KINDS = ["packed", "files", "tar"]


@pytest.fixture
def device() -> str:
    return DEVICE


def photograph(rng: np.random.Generator, number: int) -> Image.Image:
    """A part of one of two photographs, 90 to 300 pixels a side, real edges and colours."""
    photo_HWC = load_sample_images().images[number % 2]
    height, width = int(rng.integers(90, 213)), int(rng.integers(90, 300))
    top, left = int(rng.integers(427 - 2 * height)), int(rng.integers(640 - 2 * width))
    return Image.fromarray(photo_HWC[top : top + 2 * height, left : left + 2 * width]).resize((width, height))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Dataset]:
    """33 photographs as packed JPEGs, as files (JPEGs of 4:2:0, 4:2:2 and 4:4:4, every sixth a PNG), in two shards; the packed
    ones as pixels, and as squares of one size."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(33):
        path = root / "tree" / ("a" if i < 14 else "b") / f"{i:02}{'.png' if i % 6 == 5 else '.jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        how = {} if path.suffix == ".png" else {"quality": 90, "subsampling": (2, 2, 1, 0)[i % 4]}
        photograph(rng, i).save(path, **how)
    (root / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(root / f"shards/{shard}.tar", "w") as archive:
            for path in sorted((root / "tree").glob("*/*"))[shard::2]:
                add(archive, path.name, path.read_bytes())
                add(archive, path.stem + ".cls", b"1" if path.parent.name == "b" else b"0")
    tree = open_dataset("folder", root / "tree")
    for name, how in (("packed", {}), ("raw", {"raw": True}), ("square", {"square": 96})):
        pack(tree, root / f"{name}.beton", workers=1, **how)
    packed = {name: open_dataset("beton", root / f"{name}.beton") for name in ("packed", "raw", "square")}
    return {"files": tree, "tar": open_dataset("tar", root / "shards"), **packed}


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    archive.addfile(about, io.BytesIO(content))


@pytest.fixture
def opened(need):
    """``opened(name, spec, device, workers)``; closed afterwards."""
    loaders: list[EpochLoader] = []

    def make(name: str, spec: LoaderSpec, device: str = "cpu", workers: int = 2, **options) -> EpochLoader:
        if name in ("ffcv", "dali"):
            need(name)
        loaders.append(open_loader(name, spec, device, 0 if name == "torch" else workers, **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def spec_of(dataset: Dataset, **changes) -> LoaderSpec:
    plan = ViewPlan(crop="random_resized", flip="both")
    base = LoaderSpec(dataset, np.arange(len(dataset)), plan, size=64, stored=0, batch=8, seed=5, view_seed=9)
    return replace(base, **changes)


def replicated(image_HWC: np.ndarray) -> np.ndarray:
    """The image with one chroma for each 2 x 2 pixels: uint8 [H, W, 3]."""
    ycc_CHW = torch.from_numpy(np.array(Image.fromarray(image_HWC).convert("YCbCr"))).permute(2, 0, 1).float()
    height, width = image_HWC.shape[:2]
    half = F.avg_pool2d(F.pad(ycc_CHW[None, 1:], (0, width % 2, 0, height % 2), mode="replicate"), 2)
    ycc_CHW[1:] = F.interpolate(half, scale_factor=2)[0, :, :height, :width].round()
    return np.array(Image.fromarray(ycc_CHW.byte().permute(1, 2, 0).numpy(), "YCbCr").convert("RGB"))


def allowed(spec: LoaderSpec, epoch: int, batch: Batch) -> Tensor:
    """How far the crops of a batch of the torch loader may be from those of nvJPEG, mean absolute differences: float32 [B].

    By the triangle inequality: what one chroma for 2 x 2 pixels changes in that crop (half as much again, because the chroma is
    averaged from interpolated values), and what two decoders round.
    """
    out = torch.zeros(len(batch))
    for b, (index, pixels_CSS) in enumerate(zip(batch.index.tolist(), batch.pixels, strict=True)):
        image_HWC = replicated(spec.dataset.read(index))
        view = spec.view(epoch, np.array([index]), *image_HWC.shape[:2])
        out[b] = apart(cut(torch.from_numpy(image_HWC)[None], view, pixels_CSS.shape[-1]), pixels_CSS[None])[0]
    return 1.5 * out + ROUNDING


def apart(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of each image: float32 [B]."""
    return (a.cpu().float() - b.cpu().float()).abs().flatten(1).mean(1)


def same_but_pixels(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    """Indices, labels, views and what they are called on the host; and pixels of the same shape and layout."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in ("targets", "index", "view"):
            assert torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()), name
        assert np.array_equal(a.where_B2, b.where_B2) and (a.whole, a.parts) == (b.whole, b.parts)
        for name in ("pixels", "still"):
            first, second = getattr(a, name), getattr(b, name)
            assert (first is None) == (second is None), name
            if first is not None:
                assert first.shape == second.shape and first.dtype == second.dtype == torch.uint8
                assert first.stride() == second.stride()


def same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    """Down to the bytes."""
    same_but_pixels(ours, theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.pixels.cpu(), b.pixels.cpu())
        assert a.still is None or torch.equal(a.still.cpu(), b.still.cpu())


def nearly_same(spec: LoaderSpec, ours: Sequence[Batch], theirs: Sequence[Batch], *, epoch: int = 0) -> float:
    """``theirs`` being the torch loader's; returns the mean difference, which is printed, too."""
    same_but_pixels(ours, theirs)
    found = []
    for a, b in zip(ours, theirs, strict=True):
        differences = apart(a.pixels, b.pixels)
        most = allowed(spec, epoch, b)
        assert (differences <= most).all(), (b.index.tolist(), differences.tolist(), most.tolist())
        found.append(differences)
        if b.still is not None:
            assert apart(a.still, b.still).mean() < MEAN
    mean = float(torch.cat(found).mean())
    print(f"mean difference {mean:.2f}, of the worst crop {float(torch.cat(found).max()):.2f} of 255")
    assert mean < MEAN
    return mean


def busy(device: str, seconds: float = 0.3) -> Callable[[], bool]:
    """Keeps a device's current stream busy for about so long; returns what tells whether it is done."""
    if device == "cpu":
        return lambda: False
    done = torch.cuda.Event()
    torch.cuda._sleep(int(seconds * 1.5e9))  # cycles of at least 1.5 GHz
    done.record()
    return done.query


# what is tested


def serves_what_torch_serves(opened, device: str, spec: LoaderSpec, share: float) -> None:
    """In batches that leave 1, 5 and no samples for the last one; two epochs; and again from a new loader with other threads."""
    for batch in (14, 11, 8):
        its = replace(spec, batch=batch)
        loader, reference = opened("dali", its, device, hw_decoder_load=share), opened("torch", its)
        ours = list(loader)
        assert ours[0].pixels.device.type == ours[0].targets.device.type == device
        assert len(ours[-1]) == (len(spec.index_N) - 1) % batch + 1
        nearly_same(its, ours, list(reference))
    second = list(loader)
    nearly_same(its, second, list(reference), epoch=1)
    again = opened("dali", its, device, 3, hw_decoder_load=share)
    same(list(again), ours)
    same(list(again), second)


def goes_on_in_mid_epoch(opened, device: str, spec: LoaderSpec) -> None:
    """The position counts what the consumer has had; another number of threads, epochs that are left and begun anew."""
    loader, other = (opened("dali", spec, device, workers) for workers in (2, 3))
    loader.set_epoch(2)
    whole, states = [], [loader.state_dict()]
    for batch in loader:
        whole.append(batch)
        states.append(loader.state_dict())
    assert states == [{"epoch": 2, "batch": b} for b in range(len(whole) + 1)]
    for at in (0, 1, 3):
        other.load_state_dict(states[at])
        same(list(other), whole[at:])
        assert other.state_dict() == loader.state_dict() == {"epoch": 3, "batch": 0}
    other.load_state_dict(states[0])
    served = [batch for stop in (2, 1, 99) for _, batch in zip(range(stop), other, strict=False)]
    same(served, whole)


def batches_stay_valid(opened, device: str, spec: LoaderSpec) -> None:
    """A batch that is held while 10 more are taken, used and dropped; and all after the loader is closed."""
    loader = opened("dali", replace(spec, batch=3, still=80), device)
    walk = iter(loader)
    held = next(walk)
    pixels, still = held.pixels.clone(), held.still.clone()
    for _, batch in zip(range(10), walk, strict=False):
        busy(device, 0.01)
        batch.pixels.float().sum()
        del batch
    assert torch.equal(held.pixels, pixels) and torch.equal(held.still, still)
    loader.set_epoch(0)
    rest = list(loader)
    loader.close()
    assert torch.equal(rest[0].pixels, pixels)
    same(list(opened("dali", loader.spec, device)), rest)


def is_ordered_with_its_consumer(opened, device: str, spec: LoaderSpec) -> None:
    """Batches are used on a stream of the consumer's own that is late, and dropped before the device comes to them: what it reads
    is what they were, although their memory was free for others."""
    its = replace(spec, batch=4, size=160)
    loader = opened("dali", its, device)
    sums = [batch.pixels.long().sum().cpu() for batch in loader]
    loader.set_epoch(0)
    found = []
    with torch.cuda.stream(torch.cuda.Stream() if device == "cuda" else None):
        for batch in loader:
            busy(device, 0.05)
            found.append(batch.pixels.long().sum())
            del batch
    assert [int(n) for n in found] == [int(n) for n in sums]


def grows(opened, device: str, spec: LoaderSpec) -> None:
    its = replace(spec, growth=Growth(32, 0, 2, step=8))
    loader, reference = opened("dali", its, device), opened("torch", its)
    for epoch, side in enumerate((32, 48, 64)):
        ours = list(loader)
        assert {b.pixels.shape[2:] for b in ours} == {(side, side)}
        nearly_same(its, ours, list(reference), epoch=epoch)


def serves_puzzles(opened, device: str, spec: LoaderSpec) -> None:
    its = replace(spec, size=72, puzzle=Puzzle(permutations=30, grey=0.5))
    ours, theirs = list(opened("dali", its, device)), list(opened("torch", its))
    same_but_pixels(ours, theirs)
    assert ours[0].pixels.dim() == 5
    assert torch.cat([apart(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True)]).mean() < MEAN


def odd_tree(root: Path) -> Dataset:
    """What DALI decodes in another way, or leaves to us, among photographs; names say what it is."""
    rng, exif = np.random.default_rng(1), Image.Exif()
    (root / "a").mkdir()
    images = {name: photograph(rng, i) for i, name in enumerate(("cmyk", "grey", "progressive", "palette", "alpha", "gif",
                                                                 "webp", "turned", "deep", "444", "plain"))}  # fmt: skip
    exif[0x0112] = 6
    images["cmyk"].convert("CMYK").save(root / "a/cmyk.jpg")
    images["grey"].convert("L").save(root / "a/grey.jpg")
    images["progressive"].save(root / "a/progressive.jpg", progressive=True)
    images["palette"].convert("P").save(root / "a/palette.png")
    images["alpha"].convert("RGBA").save(root / "a/alpha.png")
    images["gif"].save(root / "a/picture.gif")
    images["webp"].save(root / "a/picture.webp")
    images["turned"].save(root / "a/turned.jpg", exif=exif, quality=90)
    deep = np.asarray(images["deep"].convert("L")).astype(np.uint16) * 256 + 200
    Image.fromarray(deep).save(root / "a/deep.png")
    images["444"].save(root / "a/full.jpg", subsampling=0, quality=92)
    images["plain"].save(root / "a/plain.jpg", quality=90)
    return open_dataset("folder", root)


def serves_every_kind(opened, device: str, dataset: Dataset, share: float, crop: str) -> None:
    its = spec_of(dataset, plan=ViewPlan(crop=crop, flip="both"), batch=4, shuffle=False)
    nearly_same(its, list(opened("dali", its, device, hw_decoder_load=share)), list(opened("torch", its)))


def serves_the_bytes_of_the_cpu(opened, device: str, name: str, spec: LoaderSpec) -> None:
    """Two epochs and a batch from within another, of what the CPU decodes; held while others are made."""
    there, here = opened(name, spec, device), opened(name, spec)
    held, copies = [], []
    for _ in range(2):
        ours, theirs = list(there), list(here)
        assert all(b.pixels.device.type == device and b.targets.device.type == device for b in ours)
        same(ours, theirs)
        held += ours
        copies += [b.pixels.cpu() for b in theirs]
    assert all(torch.equal(b.pixels.cpu(), c) for b, c in zip(held, copies, strict=True))
    for loader in (there, here):
        loader.load_state_dict({"epoch": 5, "batch": 2})
    same(list(there), list(here))


def does_not_wait_for_the_device(opened, device: str, name: str, spec: LoaderSpec) -> None:
    """While the consumer's kernels run, its next batch comes; what it then does with it waits for its pixels."""
    loader = opened(name, spec, device)
    walk = iter(loader)
    for _ in range(3):  # page-locked memory is set up, code is compiled
        first = next(walk)
        first.pixels.sum()
    if device == "cuda":
        torch.cuda.synchronize()
    done = busy(device)
    batch = next(walk)
    assert not done()
    total = batch.pixels.long().sum()
    reference = opened(name, spec)
    theirs = [b for _, b in zip(range(4), reference, strict=False)][-1]
    assert int(total) == int(theirs.pixels.long().sum())


# the tests


@pytest.mark.parametrize(("kind", "share"), [*((kind, 0.65) for kind in KINDS), ("packed", 0.0), ("packed", 1.0)])
def test_dali_serves_what_torch_serves_in_any_batches(opened, sets, device, kind, share):
    serves_what_torch_serves(opened, device, spec_of(sets[kind]), share)


CHANGES = {
    "evaluation": {"plan": evaluation(0.875), "shuffle": False},
    "padded": {"plan": ViewPlan(crop="pad", pad=20, flip="both")},
    "stills": {"still": 112},
    "enlarged": {"size": 224, "index_N": np.arange(12)},
    "one view": {"plan": ViewPlan(crop="random_resized", views=1, min_area=0.35)},
    "balanced": {"balance": True},
    "second of two ranks": {"rank": 1, "ranks": 2},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["packed", "files"])
def test_dali_serves_every_view(opened, sets, device, kind, changes):
    spec = spec_of(sets[kind], **changes)
    nearly_same(spec, list(opened("dali", spec, device)), list(opened("torch", spec)))


def test_dali_serves_what_ffcv_serves(opened, sets, device):
    spec = spec_of(sets["packed"], size=160)  # no box is twice as large: ffcv decodes at full size
    same(list(opened("ffcv", spec)), list(opened("torch", spec)))
    nearly_same(spec, list(opened("dali", spec, device)), list(opened("ffcv", spec)))


def test_dali_cuts_pixels(opened, sets, device):
    spec = spec_of(sets["raw"], still=80)
    assert (
        nearly_same(spec, list(opened("dali", spec, device)), list(opened("torch", spec))) < 0.5
    )  # nothing is decoded


@pytest.mark.parametrize("kind", KINDS)
def test_dali_goes_on_in_mid_epoch(opened, sets, device, kind):
    goes_on_in_mid_epoch(opened, device, spec_of(sets[kind], still=80))


def test_batches_of_dali_stay_valid(opened, sets, device):
    batches_stay_valid(opened, device, spec_of(sets["packed"]))


def test_dali_is_ordered_with_its_consumer(opened, sets, device):
    is_ordered_with_its_consumer(opened, device, spec_of(sets["packed"]))


def test_dali_grows(opened, sets, device):
    grows(opened, device, spec_of(sets["packed"]))


def test_dali_serves_puzzles(opened, sets, device):
    serves_puzzles(opened, device, spec_of(sets["packed"]))


@pytest.mark.parametrize("crop", ["random_resized", "pad"])
@pytest.mark.parametrize("share", SHARES)
def test_dali_serves_files_of_every_kind(opened, tmp_path, device, share, crop):
    serves_every_kind(opened, device, odd_tree(tmp_path), share, crop)


@pytest.mark.parametrize("name", ["resident", "ffcv", "torch"])
def test_others_serve_the_bytes_of_the_cpu(opened, sets, device, name):
    serves_the_bytes_of_the_cpu(opened, device, name, spec_of(sets["square"], still=80))


@pytest.mark.parametrize("name", ["resident", "ffcv", "dali"])
def test_no_loader_waits_for_the_device(opened, sets, device, name):
    does_not_wait_for_the_device(opened, device, name, spec_of(sets["square"]))
