"""Both loaders serve the same bytes in the same order; positions, ranks and errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fasttrain.loaders import LOADERS, LoaderSpec, ViewPlan, choose_loader, evaluation, open_dataset, open_loader

from . import samples


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """30 images of two sizes."""
    return open_dataset("folder", samples.image_tree(tmp_path_factory.mktemp("tree"), {"a": 14, "b": 16}))


@pytest.fixture(scope="module")
def even_tree(tmp_path_factory):
    """30 JPEGs of one size."""
    root = samples.image_tree(tmp_path_factory.mktemp("even"), {"a": 14, "b": 16}, sizes=((48, 36),), suffix=".jpg")
    return open_dataset("folder", root)


def spec_of(dataset, **changes) -> LoaderSpec:
    plan = ViewPlan(crop="random_resized", flip="both")
    base = LoaderSpec(dataset, np.arange(len(dataset)), plan, size=16, stored=0, batch=7, seed=5, view_seed=9)
    return replace(base, **changes)


PLANS = {
    "pad": {"plan": ViewPlan(crop="pad", pad=3, flip="both"), "stored": 16},
    "pad, shrunk": {"plan": ViewPlan(crop="pad", pad=3), "stored": 20},
    "random-resized, stored": {"stored": 32},
    "random-resized, still": {"stored": 24, "still": 40},
    "views": {"plan": ViewPlan(crop="random_resized", views=2), "stored": 24},
    "centre": {"plan": evaluation(0.875), "stored": 32, "shuffle": False},
    "drop last": {"stored": 24, "drop_last": True},
}


def same(a, b) -> None:
    for name in ("pixels", "targets", "index", "view", "still"):
        first, second = getattr(a, name), getattr(b, name)
        assert (first is None) == (second is None)
        assert first is None or (first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu())), name


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("workers", [0, 2])
def test_pixel_for_pixel(tree, changes, workers):
    spec = spec_of(tree, **changes)
    resident, files = open_loader("resident", spec), open_loader("torch", spec, workers=workers)
    assert len(resident) == len(files) == (4 if spec.drop_last else 5)
    for _ in range(2):  # two epochs
        ours, theirs = list(resident), list(files)
        assert len(ours) == len(theirs) == len(resident)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
            assert a.pixels.shape[1:] == (3, 16, 16)
            assert a.pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("still", [0, 50])
def test_pixel_for_pixel_at_the_files_own_size(even_tree, still):
    spec = spec_of(even_tree, still=still)
    for a, b in zip(open_loader("resident", spec), open_loader("torch", spec), strict=True):
        same(a, b)


def test_the_torch_loader_takes_files_of_any_size_and_resident_says_what_it_needs(tree):
    assert sum(len(b) for b in open_loader("torch", spec_of(tree))) == 30
    with pytest.raises(ValueError, match=r"differ in size .* set data\.stored"):
        open_loader("resident", spec_of(tree))
    assert choose_loader(spec_of(tree))[0] == "torch"
    assert choose_loader(spec_of(tree, stored=24))[0] == "resident"


def test_labels_and_indices_belong_to_the_pixels(tree):
    spec = spec_of(tree, plan=evaluation(), stored=16, shuffle=True)
    for batch in open_loader("resident", spec):
        for pixels, target, index in zip(batch.pixels, batch.targets, batch.index, strict=True):
            alone = spec_of(tree, plan=evaluation(), stored=16, index_N=np.array([int(index)]))
            assert torch.equal(next(iter(open_loader("torch", alone))).pixels[0], pixels)
            assert int(target) == tree.targets_N[int(index)]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_going_on_in_mid_epoch(tree, name, at):
    spec = spec_of(tree, stored=24)
    whole = open_loader(name, spec)
    whole.set_epoch(3)
    batches, state = [], whole.state_dict()
    for i, batch in enumerate(whole):
        batches.append(batch)
        if i + 1 == at:
            state = whole.state_dict()
    rest = open_loader(name, spec)
    rest.load_state_dict(state)
    going_on = list(rest)
    assert len(going_on) == 5 - at
    for a, b in zip(batches[at:], going_on, strict=True):
        same(a, b)
    assert whole.state_dict() == rest.state_dict() == {"epoch": 4, "batch": 0}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_same_global_batches(tree, name, ranks):
    spec = spec_of(tree, stored=24)
    whole = list(open_loader("resident", spec))
    parts = [list(open_loader(name, replace(spec, rank=r, ranks=ranks))) for r in range(ranks)]
    for b, batch in enumerate(whole):
        pieces = [p[b] for p in parts]
        assert torch.equal(torch.cat([p.index for p in pieces]), batch.index)
        assert torch.equal(torch.cat([p.pixels for p in pieces]), batch.pixels)


def test_batch_size_does_not_change_a_view(tree):
    rows = {}
    for batch_size in (1, 7, 30):
        for batch in open_loader("resident", spec_of(tree, stored=24, batch=batch_size)):
            for index, pixels in zip(batch.index.tolist(), batch.pixels, strict=True):
                assert torch.equal(rows.setdefault(index, pixels), pixels)
    assert len(rows) == 30


def test_a_part_of_a_data_set(tree):
    index = np.array([3, 4, 11, 20, 29])
    spec = spec_of(tree, index_N=index, stored=24, batch=2)
    served = torch.cat([b.index for b in open_loader("resident", spec)])
    assert sorted(served.tolist()) == index.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_where_the_batch_is_used(tmp_path, workers):
    root = samples.image_tree(tmp_path, {"a": 5, "b": 5})
    (root / "a/003.png").write_bytes(b"no image")
    dataset = open_dataset("folder", root)
    with pytest.raises(ValueError, match=r"^cannot read the image .*a/003\.png"):
        list(open_loader("torch", spec_of(dataset), workers=workers))
    with pytest.raises(ValueError, match=r"^cannot read the image .*a/003\.png"):
        open_loader("resident", spec_of(dataset, stored=16))


def test_unknown_loader(tree):
    with pytest.raises(ValueError, match="no loader is called 'dally'; there are auto, resident, torch"):
        open_loader("dally", spec_of(tree))


@pytest.mark.gpu
def test_a_gpu_holds_the_same_batches(tree):
    spec = spec_of(tree, stored=24, still=32)
    for name in LOADERS:
        for a, b in zip(open_loader(name, spec, "cuda"), open_loader("resident", spec), strict=True):
            assert a.pixels.device.type == "cuda"
            same(a, b)
