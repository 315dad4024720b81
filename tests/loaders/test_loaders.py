"""The loaders that take any files serve the same bytes in the same order; which loader is chosen, and why.

test_equivalence.py has all of them, on packed sets.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from fasttrain.loaders import LoaderSpec, ViewPlan, choose_loader, evaluation, open_dataset, open_loader, resident
from fasttrain.loaders import choose as choosing
from fasttrain.loaders.pack import pack
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_no_matrix_product_in_a_worker(tree):
    """In a process that was forked from one with threads MKL's may go round forever."""

    class NoProducts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert not re.search("mm|addmv|matmul|linear|conv", function.name()), function.name()
            return function(*args, **(kwargs or {}))

    for changes in PLANS.values():
        loader, seen = open_loader("torch", spec_of(tree, **changes)), 0
        with NoProducts():
            for batch in loader:
                seen += len(batch)
        assert seen >= 28
    with pytest.raises(AssertionError, match="mm"), NoProducts():
        torch.ones(2, 2) @ torch.ones(2, 2)


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


@pytest.mark.parametrize("name", ["resident", "torch"])
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


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS.keys())
def test_batches_that_are_cut_together_are_the_same(tree, changes, monkeypatch):
    """As a GPU's are, 16 at once or fewer."""
    spec, alone = spec_of(tree, **changes), []
    monkeypatch.setattr(resident, "_AHEAD", 1)
    for epoch in (0, 1):
        loader = open_loader("resident", spec)
        loader.set_epoch(epoch)
        alone += list(loader)
    for ahead in (3, 16):
        monkeypatch.setattr(resident, "_AHEAD", ahead)
        loader, together = open_loader("resident", spec), []
        loader._together = True
        for _ in range(2):
            together += list(loader)
        assert len(alone) == len(together)
        for a, b in zip(alone, together, strict=True):
            same(a, b)
            assert np.array_equal(a.where_B2, b.where_B2) and (a.whole, a.parts) == (b.whole, b.parts)
            assert b.pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resident", "torch"])
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
    with pytest.raises(
        ValueError, match="no loader is called 'dally'; there are auto, resident, ffcv, dali, torch, video, synthetic"
    ):
        open_loader("dally", spec_of(tree))


@pytest.fixture(scope="module")
def packed(tree, even_tree, tmp_path_factory):
    """Packed: images of two sizes, the same as pixels, and images of one size."""
    root = tmp_path_factory.mktemp("packed")
    pack(tree, root / "kept.beton")
    pack(tree, root / "raw.beton", raw=True)
    pack(even_tree, root / "even.beton")
    return {name: open_dataset("beton", root / f"{name}.beton") for name in ("kept", "raw", "even")}


@pytest.fixture
def machine(monkeypatch):
    """``machine(missing, free)``: a machine without some modules, and with so much free memory."""

    def make(*missing: str, free: int = 1 << 34) -> None:
        monkeypatch.setattr(choosing, "missing_part", lambda m: f"ImportError: no {m}" if m in missing else "")
        monkeypatch.setattr(choosing, "_missing_libjpeg", lambda: "no libturbojpeg" if "libjpeg" in missing else "")
        monkeypatch.setattr(choosing, "_free_memory", lambda device: free)

    return make


SEVERAL, LARGE = r"images of several sizes", r"too large to be resident: 0\.00 GiB decoded, 0\.0 GiB free on c"


@pytest.mark.parametrize(
    ("data", "changes", "missing", "device", "choice", "why"),
    [
        ("kept", {}, (), "cpu", "ffcv", rf"a packed file \(measured, .*cpu\.json\); {SEVERAL}"),
        ("raw", {}, (), "cuda", "ffcv", rf"a packed file \(not yet measured on a GPU; .*\); {SEVERAL}"),
        ("even", {}, (), "cpu", "ffcv", rf"a packed file .*; {LARGE}pu"),
        ("kept", {}, ("ffcv",), "cpu", "torch", rf"SLOW: .* FFCV is not here \(ImportError: no ffcv\); {SEVERAL}"),
        ("kept", {}, ("libjpeg",), "cpu", "torch", r"SLOW: .* \(no libturbojpeg\)"),
        ("kept", {}, ("ffcv",), "cuda", "dali", r"a packed file, and FFCV is not here \(ImportError: no ffcv\)"),
        ("kept", {}, ("ffcv", "nvidia.dali"), "cuda", "torch", r"SLOW: "),
        ("kept", {"stored": 24}, (), "cpu", "torch", rf"{LARGE}pu$"),
        ("tree", {}, (), "cpu", "torch", r"files of any size .*; `fasttrain pack` makes a file that loads faster"),
        ("tree", {}, (), "cuda", "dali", r"files that a GPU can decode \(not yet .*\); files of any size"),
        ("tree", {}, ("nvidia.dali",), "cuda", "torch", r"files of any size"),
    ],
)
def test_the_choice_and_its_reason(tree, packed, machine, data, changes, missing, device, choice, why):
    machine(*missing, free=100)
    chosen, said = choose_loader(spec_of({"tree": tree, **packed}[data], **changes), device)
    assert chosen == choice
    assert re.match(why, said), said


def test_a_rule_that_names_a_result_is_the_fastest_there(repository, monkeypatch):
    """And a result that says otherwise changes one line."""
    rows = {"cpu": {"ffcv": "ffcv", "torch": "torch", "dali": "dali cpu"}, "cuda": {"dali": "dali gpu", "ffcv": "ffcv"}}
    for rule in (rule for rule in choosing.RULES if rule.result):
        content = json.loads((repository / "benchmarks/results" / rule.result).read_text())
        assert content["device"].startswith(rule.device)
        speed = {(row["name"], row["size"]): row["images_per_s"] for row in content["rows"]}
        for size in {size for _, size in speed}:
            found = {name: speed[row, size] for name, row in rows[rule.device].items() if (row, size) in speed}
            assert max(found, key=found.__getitem__) == rule.loader
    monkeypatch.setattr(choosing, "missing_part", lambda module: "")
    assert choosing.chosen_here("cuda").startswith("packed files: ffcv (not yet measured on a GPU")
    first = choosing.Rule(choosing.PACKED, "cuda", "dali", result="a-result.json")
    monkeypatch.setattr(choosing, "RULES", (first, *choosing.RULES))
    assert choosing.chosen_here("cuda").startswith("packed files: dali (measured, a-result.json); other files: dali (")


def test_what_fits_is_resident(packed, machine):
    """A quarter of the memory for what is decoded; JPEGs or pixels, of one size or brought to one."""
    need = 30 * 3 * 48 * 36
    for free, choice in ((4 * need, "resident"), (4 * need - 1, "ffcv")):
        machine(free=free)
        assert choose_loader(spec_of(packed["even"]))[0] == choice
    machine()
    for name, changes in (("raw", {"stored": 16}), ("kept", {"stored": 16}), ("even", {})):
        spec = spec_of(packed[name], **changes)
        chosen, why = choose_loader(spec)
        assert chosen == "resident" and "GiB decoded, 16.0 GiB free on cpu" in why
        assert sum(len(b) for b in open_loader(chosen, spec)) == 30
    one_size = np.arange(0, 30, 2)  # a split is looked at, not the file
    sides = {packed["raw"].read.size(i) for i in one_size}
    assert choose_loader(spec_of(packed["raw"], index_N=one_size))[0] == ("resident" if len(sides) == 1 else "ffcv")


def test_synthetic_is_one_batch_again_and_again(tree):
    loader = open_loader("synthetic", spec_of(tree, still=20))
    first, second = list(loader), list(loader)
    assert [len(b) for b in first] == [7, 7, 7, 7, 2] and len(loader) == 5
    assert all(b.pixels is first[0].pixels for b in (*first[:4], *second[:4]))
    assert first[0].pixels.shape == (7, 3, 16, 16) and first[4].still.shape == (2, 3, 20, 20)
    assert first[0].pixels.is_contiguous(memory_format=torch.channels_last)
    assert loader.state_dict() == {"epoch": 2, "batch": 0}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["resident", "ffcv", "torch"])
def test_a_gpu_holds_the_same_batches(packed, need, name):
    if name == "ffcv":
        need(name)
    spec = spec_of(packed["even"], still=32)
    for a, b in zip(open_loader(name, spec, "cuda", 2), open_loader("torch", spec), strict=True):
        assert a.pixels.device.type == "cuda"
        same(a, b)
