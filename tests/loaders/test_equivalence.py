"""All loaders serve the same samples, labels and views in the same order, whatever happens to them meanwhile.

The reference is the torch loader without workers, and where it can be computed by hand, that.
"""

import gc
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain.loaders import LOADERS, Dataset, Growth, LoaderSpec, ViewPlan, evaluation, open_dataset, open_loader
from fasttrain.loaders.beton import read_beton
from fasttrain.loaders.datasets.base import Files
from fasttrain.loaders.order import batches
from fasttrain.loaders.pack import pack
from PIL import Image
from sklearn.datasets import load_sample_images

NAMES = [n for n in LOADERS if n not in ("synthetic", "video")]  # of images
WAYS = [("torch", 0), ("torch", 2), ("ffcv", 2), ("dali", 1)]  # with so many processes or threads
EVERY = [("resident", 0), *WAYS]
PLANS = {
    "random-resized": ViewPlan(crop="random_resized", flip="both"),
    "pad": ViewPlan(crop="pad", pad=5, flip="both"),
    "centre": evaluation(0.875),
}


def photographs(root: Path, count: int = 40) -> Path:
    """Parts of photographs in two classes: JPEGs (4:2:0) of three sizes, and every eighth a PNG."""
    photo_2, rng = load_sample_images().images, np.random.default_rng(0)
    for i in range(count):
        width, height = ((160, 120), (90, 130), (128, 128))[i % 3]
        top, left = int(rng.integers(0, 427 - 2 * height)), int(rng.integers(0, 640 - 2 * width))
        box = (left, top, left + 2 * width, top + 2 * height)
        image = Image.fromarray(photo_2[i % 2]).resize((width, height), box=box)
        folder = root / "ab"[i % 5 > 1]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / (f"{i:03}.png" if i % 8 == 7 else f"{i:03}.jpg"), quality=90, subsampling=2)
    return root


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Packed sets by name: JPEGs without and with a seek index, pixels, and squares of one size (which can be resident)."""
    root = tmp_path_factory.mktemp("packed")
    tree = open_dataset("folder", photographs(root / "tree"))
    options: dict = {"no index": {"seek": False}, "index": {}, "raw": {"raw": True}, "square": {"square": 64}}
    options["square, no index"] = {"square": 64, "seek": False}
    for name, how in options.items():
        pack(tree, root / f"{name}.beton", workers=1, **how)
    return {name: open_dataset("beton", root / f"{name}.beton") for name in options}


@pytest.fixture
def opened(need):
    """``opened(name, spec, workers)``, and afterwards no process and no thread of a loader is left."""
    before, loaders = running(), []

    def make(name: str, spec: LoaderSpec, workers: int = 1):
        if name in ("ffcv", "dali"):
            need(name)
        loaders.append(open_loader(name, spec, workers=workers))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()
        loader.close()
    assert_nothing_left(before)


def running() -> set:
    """Threads of this process, and the processes that it has started."""
    return {t for t in threading.enumerate() if t.is_alive()} | children()


def assert_nothing_left(before: set, seconds: float = 3) -> None:
    """Nothing runs that did not run before: other tests of this process may have left something."""
    end = time.monotonic() + seconds
    while left := running() - before:
        assert time.monotonic() < end, left
        time.sleep(0.05)


def children() -> set[int]:
    """Processes that this one has started and that still run, but for the one by which Python counts shared memory."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:  # it ended just now
            continue
        if int(parent) == os.getpid() and state != "Z" and b"resource_tracker" not in command:
            found.add(int(stat.parent.name))
    return found


def spec_of(dataset: Dataset, **changes) -> LoaderSpec:
    base = LoaderSpec(dataset, np.arange(len(dataset)), PLANS["random-resized"], size=40, stored=0, batch=7, seed=5)
    return replace(base, view_seed=9, **changes)


def assert_same(ours, theirs, *, pixels: bool = True) -> None:
    """Two lists of batches."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in ("targets", "index", "view", *(("pixels", "still") if pixels else ())):
            first, second = getattr(a, name), getattr(b, name)
            assert (first is None) == (second is None), name
            assert first is None or (first.dtype == second.dtype and torch.equal(first, second)), name


def differences(ours, theirs) -> np.ndarray:
    """The mean absolute difference of every image's pixels: [N]."""
    out = []
    for a, b in zip(ours, theirs, strict=True):
        assert a.pixels.shape == b.pixels.shape
        assert a.pixels.is_contiguous(memory_format=torch.channels_last)
        out.append((a.pixels.float() - b.pixels.float()).abs().flatten(1).mean(1))
    return torch.cat(out).numpy()


WALKS = {
    "batches of 1": {"batch": 1, "index_N": np.arange(5)},
    "last one partial": {"batch": 7},
    "last one dropped": {"batch": 7, "drop_last": True},
    "all in one": {"batch": 100, "shuffle": False},
    "2 ranks, odd": {"batch": 7, "ranks": 2},
    "5 ranks, last part as large as a full one": {"batch": 16, "ranks": 5, "index_N": np.arange(31)},
    "4 ranks, last parts empty": {"batch": 9, "ranks": 4, "index_N": np.arange(1, 39)},
    "5 ranks, some parts always empty": {"batch": 3, "ranks": 5, "index_N": np.arange(11)},
}


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize(("name", "workers"), [(n, min(w, 1) if n == "ffcv" else w) for n, w in EVERY])
def test_order_labels_and_views(opened, packed, name, workers, walk):
    """By hand: the order cut into batches, these into ranks; a view is the epoch modulo their number."""
    spec = spec_of(packed["square"], plan=ViewPlan(crop="random_resized", views=3), size=40, **walk)
    for rank in range(spec.ranks) if spec.ranks < 3 else (0, 2, spec.ranks - 1):
        spec = replace(spec, rank=rank)
        loader = opened(name, spec, workers)
        loader.set_epoch(4)
        cut = {"global_batch": spec.batch, "drop_last": spec.drop_last, "rank": rank, "ranks": spec.ranks}
        expected, got = list(batches(spec.epoch_order(4), **cut)), list(loader)
        assert len(got) == len(loader) == len(expected)
        for batch, index_B in zip(got, expected, strict=True):
            assert batch.index.tolist() == index_B.tolist()
            assert batch.targets.tolist() == spec.dataset.targets_N[index_B].tolist()
            assert (batch.view == 1).all() and batch.view.dtype == batch.targets.dtype == torch.int64
            assert batch.pixels.shape == (len(index_B), 3, 40, 40) and batch.pixels.dtype == torch.uint8
        reference = opened("torch", spec, 0)
        reference.set_epoch(4)
        if name != "dali":
            assert_same(got, list(reference))


@pytest.mark.parametrize("kind", ["no index", "index", "raw"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_ffcv_shows_what_torch_shows(opened, packed, kind, plan):
    """Byte for byte, but where a box is at least twice the output: there a smaller inverse DCT decodes."""
    read = packed[kind].read
    for threads, sides in ((1, {"size": 40}), (2, {"size": 40, "still": 90})):
        spec = spec_of(packed[kind], plan=plan, **sides)
        got, expected = (list(opened(n, spec, t)) for n, t in (("ffcv", threads), ("torch", 0)))
        assert_same(got, expected, pixels=False)
        index = torch.cat([b.index for b in got]).numpy()
        view = spec.view(0, index, read.file.height_N[index], read.file.width_N[index])
        scaled = (view.box_B4[:, 2:].min(1) >= 2 * max(sides.values())) & ~read.raw_N[index]
        assert scaled.any() == ("still" not in sides and kind != "raw")
        if not scaled.any():
            assert_same(got, expected)
            continue
        difference = differences(got, expected)
        print(f"{scaled.sum()} decoded smaller: mean difference {difference[scaled].mean():.2f}")
        assert (difference[~scaled] == 0).all()
        assert difference[scaled].mean() < 3 and difference.max() < 5


@pytest.mark.parametrize("kind", ["no index", "index", "raw"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_dali_shows_nearly_what_torch_shows(opened, packed, kind, plan):
    spec = spec_of(packed[kind], plan=plan, still=66)
    expected, got = list(opened("torch", spec, 0)), list(opened("dali", spec))
    assert_same(got, expected, pixels=False)
    difference = differences(got, expected)
    still = differences([replace(b, pixels=b.still) for b in got], [replace(b, pixels=b.still) for b in expected])
    print(f"mean difference {difference.mean():.2f}, at most {difference.max():.2f}; still {still.mean():.2f}")
    assert difference.mean() < 1 and difference.max() < 3 and still.max() < 3


@pytest.mark.parametrize("name", NAMES)
def test_runs_are_alike(opened, packed, name):
    """Epochs again and again, in any order, with other threads, from a new loader, in batches of another size."""
    spec = spec_of(packed["square"], still=48)
    first = opened(name, spec, 1)
    epochs = [list(first) for _ in range(3)]
    assert first.state_dict() == {"epoch": 3, "batch": 0}
    assert not torch.equal(epochs[0][0].index, epochs[1][0].index)
    for epoch in (2, 0, 1):
        first.set_epoch(epoch)
        assert_same(list(first), epochs[epoch])
    assert_same(list(opened(name, spec, 2)), epochs[0])
    row = {int(i): p for b in epochs[0] for i, p in zip(b.index, b.pixels, strict=True)}
    for batch in opened(name, replace(spec, batch=11)):
        assert all(torch.equal(row[int(i)], p) for i, p in zip(batch.index, batch.pixels, strict=True))


@pytest.mark.parametrize(("name", "workers"), EVERY)
def test_going_on_anywhere(opened, packed, name, workers):
    """With another number of processes or threads; the state counts what the consumer has had."""
    spec = spec_of(packed["square"], still=48)
    loader = opened(name, spec, workers)
    loader.set_epoch(3)
    whole, states = [], [loader.state_dict()]
    for batch in loader:
        whole.append(batch)
        states.append(loader.state_dict())
    assert states == [{"epoch": 3, "batch": b} for b in range(7)]
    other = opened(name, spec, 2 - workers if name == "torch" else 3 - workers)
    for at, state in enumerate(states):
        other.load_state_dict(state)
        assert_same(list(other), whole[at:])
        assert other.state_dict() == {"epoch": 4, "batch": 0}


@pytest.mark.parametrize("name", NAMES)
def test_going_on_with_other_ranks(opened, packed, name):
    """A run on one GPU goes on, on three."""
    spec = spec_of(packed["square"], batch=8)
    whole = list(opened(name, spec))
    parts = []
    for rank in range(3):
        loader = opened(name, replace(spec, rank=rank, ranks=3))
        loader.load_state_dict({"epoch": 0, "batch": 2})
        parts.append(list(loader))
    for batch, pieces in zip(whole[2:], zip(*parts, strict=True), strict=True):
        for field in ("pixels", "targets", "index", "view"):
            assert torch.equal(torch.cat([getattr(p, field) for p in pieces]), getattr(batch, field))


@pytest.mark.parametrize(("name", "workers"), EVERY)
def test_an_epoch_given_up_goes_on_where_it_was(opened, packed, name, workers):
    spec = spec_of(packed["square"])
    whole = list(opened(name, spec, workers))
    loader, served = opened(name, spec, workers), []
    for stop in (2, 1, 99):
        for _, batch in zip(range(stop), loader, strict=False):
            served.append(batch)
    assert_same(served, whole)
    loader.set_epoch(0)
    old = iter(loader)  # given up, but kept
    next(old)
    rest, served = iter(loader), []
    served.append(next(rest))
    del old  # ends while its successor is at work
    assert_same([*served, *rest], whole[1:])


@pytest.mark.parametrize(("name", "workers"), EVERY)
def test_a_closed_loader_serves_nothing_wrong(opened, packed, name, workers):
    """Who iterates on gets what comes next, or an error: no other sample's pixels. It can be used again."""
    spec = spec_of(packed["square"], batch=2)
    whole = list(opened(name, spec, workers))
    loader = opened(name, spec, workers)
    iterator = iter(loader)
    served = [next(iterator)]
    time.sleep(0.1)  # let it get ahead
    loader.close()
    for _ in range(6):
        try:
            served.append(next(iterator))
        except (RuntimeError, StopIteration):
            break
    assert_same(served, whole[: len(served)])
    iterator.close()
    loader.set_epoch(0)
    assert_same(list(loader), whole)


@pytest.mark.parametrize(("name", "workers"), EVERY)
def test_an_evaluation_in_the_middle_of_an_epoch(opened, packed, name, workers):
    train = spec_of(packed["square"])
    test = replace(train, plan=evaluation(), size=24, shuffle=False, batch=16)
    expected = [list(opened(name, s, workers)) for s in (train, test)]
    trained, loader = [], opened(name, test, workers)
    for batch in opened(name, train, workers):
        trained.append(batch)
        loader.set_epoch(0)
        assert_same(list(loader), expected[1])
        if len(trained) == 2:
            loader.close()  # as the trainer does
    assert_same(trained, expected[0])


@pytest.mark.parametrize("name", NAMES)
def test_loaders_in_threads(opened, packed, name):
    """Two at once, in threads of Python's, neither in the one that made it."""
    specs = [spec_of(packed["square"], seed=s, batch=3) for s in (0, 1)]
    threads = 0 if name == "torch" else 2
    expected = [list(opened(name, s, threads)) * 3 for s in specs]
    loaders, got = [opened(name, s, threads) for s in specs], {}

    def consume(which: int) -> None:
        got[which] = []
        for _ in range(3):
            loaders[which].set_epoch(0)
            got[which] += list(loaders[which])

    workers = [threading.Thread(target=consume, args=(w,)) for w in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for which in (0, 1):
        assert_same(got[which], expected[which])


@pytest.mark.parametrize(("name", "workers"), EVERY)
def test_images_grow(opened, packed, name, workers):
    spec = spec_of(packed["square"], size=56, still=64, growth=Growth(16, start=0, end=3, step=8), batch=20)
    loader, reference = opened(name, spec, workers), opened("torch", spec, 0)
    for side in (16, 32, 40, 56, 56):
        got, expected = list(loader), list(reference)
        assert {b.pixels.shape[2:] for b in got} == {(side, side)} and got[0].still.shape[2:] == (64, 64)
        assert_same(got, expected, pixels=name != "dali")
        assert differences(got, expected).max() < 3


@pytest.mark.parametrize(("name", "workers"), EVERY)
def test_balanced(opened, packed, name, workers):
    spec = spec_of(packed["square"], balance=True, index_N=np.arange(2, 37))
    loader = opened(name, spec, workers)
    for epoch in range(2):
        got = list(loader)
        index = torch.cat([b.index for b in got]).numpy()
        assert (index == spec.epoch_order(epoch)).all() and len(index) == 35
        counts = np.bincount(torch.cat([b.targets for b in got]))
        assert sorted(counts) == [17, 18]
        same = {}
        for batch in got:  # a sample that comes twice is shown twice alike
            for i, pixels in zip(batch.index.tolist(), batch.pixels, strict=True):
                assert torch.equal(same.setdefault(i, pixels), pixels)


@pytest.mark.parametrize("name", NAMES)
def test_many_labels(opened, packed, tmp_path, name):
    """A multi-label data set: float32 [B, C], -1 included."""
    paths = sorted(Path(packed["square"].source).parent.glob("tree/*/*.jpg"))[:11]
    target_NC = np.random.default_rng(0).integers(-1, 2, (11, 4)).astype(np.float32)
    splits = {"train": np.arange(9), "val": np.array([9]), "test": np.array([10])}
    dataset = Dataset("many", tuple("wxyz"), target_NC, Files(paths), splits, "here")
    pack(dataset, tmp_path / "many.beton", square=32)
    many = open_dataset("beton", tmp_path / "many.beton")
    assert many.multi_label and many.classes == tuple("wxyz")
    for batch in opened(name, spec_of(many, index_N=many.splits["train"], batch=4)):
        assert batch.targets.dtype == torch.float32
        assert (batch.targets.numpy() == target_NC[batch.index.numpy()]).all()


def damaged(file: Path, to: Path, **how: str) -> Dataset:
    """A copy of a packed file with damage to some samples' bytes on disk: ``s3="head"`` to number 3."""
    to.mkdir()
    for part in (file, file.with_name(file.name + ".json")):
        shutil.copy(part, to / part.name)
    records = read_beton(file)
    with (to / file.name).open("r+b") as out:
        for sample, kind in how.items():
            start, size = (int(a[int(sample[1:])]) for a in (records.ptr_N, records.size_N))
            at, content = {
                "head": (0, bytes(40)),
                # the end marker is lost, too; DALI, and ours before a cut, take some of these for whole images
                "cut off": (size // 2, bytes(size - size // 2)),  # the end marker is lost, too
                "8 bytes": (size // 2, bytes(8)),  # libjpeg warns, and makes a picture of it
            }[kind]
            out.seek(start + at)
            out.write(content)
    return open_dataset("beton", to / file.name)


@pytest.mark.parametrize("kind", ["head", "cut off"])
@pytest.mark.parametrize(("name", "workers"), EVERY)
def test_a_damaged_sample_is_named_where_it_is_used(opened, packed, tmp_path, name, workers, kind):
    bad = damaged(packed["square"].read.file.path, tmp_path / "bad", s21=kind)
    spec = spec_of(bad, plan=evaluation(), shuffle=False)
    said = f"cannot read the image {re.escape(str(bad.read.file.path))}, sample 21: "
    if name == "resident":
        with pytest.raises(ValueError, match=said):
            opened(name, spec)
        return
    before, loader, served = running(), opened(name, spec, workers), []
    with pytest.raises(ValueError, match=said):
        for batch in loader:
            served.append(batch)
    assert_nothing_left(before)
    assert len(served) == 3
    assert loader.state_dict() == {"epoch": 0, "batch": 3}
    loader.set_epoch(0)  # and again
    assert_same([next(iter(loader))], served[:1])


@pytest.mark.parametrize(("name", "workers"), EVERY)
def test_stand_ins(opened, packed, tmp_path, name, workers):
    """The next good one of the split, with its own index, label and view; counted once."""
    bad = damaged(packed["square"].read.file.path, tmp_path / "bad", s21="head", s22="cut off", s38="cut off")
    spec = spec_of(bad, plan=ViewPlan(crop="pad", pad=3, flip="both"), on_bad_sample="skip", index_N=np.arange(1, 39))
    loader = opened(name, spec, workers)
    for epoch in range(2):
        got = list(loader)
        index = spec.epoch_order(epoch).copy()
        for number, instead in ((21, 23), (22, 23), (38, 1)):
            index[index == number] = instead
        assert (torch.cat([b.index for b in got]).numpy() == index).all()
        assert (torch.cat([b.targets for b in got]).numpy() == bad.targets_N[index]).all()
        rows: dict = {}
        for batch in got:
            for i, pixels in zip(batch.index.tolist(), batch.pixels, strict=True):
                assert torch.equal(rows.setdefault(i, pixels), pixels)  # its own view
        clean = replace(spec, dataset=packed["square"], index_N=np.setdiff1d(spec.index_N, [21, 22, 38]))
        reference = opened("torch", clean, 0)
        reference.set_epoch(epoch)
        for batch in reference:
            for i, pixels in zip(batch.index.tolist(), batch.pixels, strict=True):
                difference = (rows[i].float() - pixels.float()).abs().mean()
                assert difference < 2 if name == "dali" else difference == 0
    assert sorted(loader.bad) == [21, 22, 38]
    assert all(f"sample {i}: " in why for i, why in loader.bad.items())


@pytest.mark.parametrize(("name", "workers"), EVERY)
def test_nothing_can_stand_in(opened, packed, tmp_path, name, workers):
    bad = damaged(packed["square"].read.file.path, tmp_path / "bad", **{f"s{i}": "head" for i in range(4)})
    with pytest.raises(ValueError, match="4 samples in a row cannot be read; the first: cannot read the image"):
        list(opened(name, spec_of(bad, index_N=np.arange(4), on_bad_sample="skip"), workers))


@pytest.mark.parametrize(("name", "workers"), EVERY)
def test_damage_that_libjpeg_makes_a_picture_of(opened, packed, tmp_path, name, workers):
    """Only warnings: nobody is told, but all loaders show the same (`fasttrain pack --check` finds it).

    With an index the ffcv loader shows better ones, since it begins anew at every place.
    """
    bad = damaged(packed["square, no index"].read.file.path, tmp_path / "bad", s11="8 bytes", s20="8 bytes")
    spec = spec_of(bad, plan=evaluation(), shuffle=False)
    got, expected = list(opened(name, spec, workers)), list(opened("torch", spec, 0))
    assert_same(got, expected, pixels=name != "dali")
    assert differences(got, expected).max() < 3


@pytest.mark.parametrize(("name", "workers"), WAYS)
def test_an_error_where_the_batches_are_used(opened, packed, name, workers):
    before = running()
    loader = opened(name, spec_of(packed["square"], batch=2), workers)
    with pytest.raises(KeyboardInterrupt):
        for _ in loader:
            raise KeyboardInterrupt
    loader.close()
    assert_nothing_left(before)


@pytest.mark.parametrize(("name", "workers"), WAYS)
def test_a_loader_that_is_dropped(need, packed, name, workers):
    if name in ("ffcv", "dali"):
        need(name)
    before = running()
    loader = open_loader(name, spec_of(packed["square"], batch=2), workers=workers)
    iterator = iter(loader)
    next(iterator)
    new = running() - before
    assert name == "torch" or any(isinstance(one, threading.Thread) for one in new)
    assert not (name == "torch" and workers) or len(new & children()) == workers
    start = time.monotonic()
    del loader, iterator
    gc.collect()
    assert_nothing_left(before)
    assert time.monotonic() - start < 5  # for which PyTorch would wait for each of its processes


def test_a_killed_worker_is_an_error(opened, packed):
    before = children()
    loader = opened("torch", spec_of(packed["square"], batch=1), 2)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"worker \(pid.*\) (is killed|exited unexpectedly)"):
        for _ in loader:  # one of them: each that ends raises the error once more, wherever Python is then
            os.kill(min(children() - before), signal.SIGKILL)
            time.sleep(15)  # here
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("name", "workers"), [("torch", 0), ("ffcv", 2), ("dali", 1)])
def test_memory_does_not_grow(opened, packed, name, workers):
    """Over twenty epochs; the median, for a process that has done much has holes to fill, and fills them at any time."""
    loader = opened(name, spec_of(packed["square"], batch=20, size=192), workers)
    after = []
    for _ in range(20):
        for batch in loader:  # noqa: B007
            pass
        after.append(resident_mib())
    grown, leak = np.diff(after[3:]), batch.pixels.numel() / 2**20
    assert leak > 2 and np.median(grown) < leak / 4, grown  # a batch that stays every time would be `leak`


def resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024
