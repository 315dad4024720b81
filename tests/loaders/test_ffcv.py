"""What only the ffcv loader has: FFCV's thread and ring of memory, its process-wide settings, files that it wrote."""

import itertools
import subprocess
import sys
import threading
import time
from dataclasses import replace
from queue import Queue

import numba
import numpy as np
import pytest
import torch
from fasttrain.loaders import (
    Growth,
    LoaderSpec,
    ViewPlan,
    baseline,
    ffcv_loader,
    huffman,
    open_dataset,
    open_loader,
)
from fasttrain.loaders.ffcv_loader import _deal, _next
from fasttrain.loaders.pack import pack

from . import samples


@pytest.fixture(autouse=True)
def _ffcv(need):
    need("ffcv")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """24 JPEGs of two sizes."""
    root = tmp_path_factory.mktemp("ffcv")
    tree = samples.image_tree(root / "tree", {"a": 11, "b": 13}, sizes=((48, 36), (40, 52)), suffix=".jpg")
    pack(open_dataset("folder", tree), root / "set.beton", workers=1)
    dataset = open_dataset("beton", root / "set.beton")
    plan = ViewPlan(crop="random_resized", flip="both")
    return LoaderSpec(dataset, np.arange(24), plan, size=32, stored=0, batch=2, seed=5, view_seed=9)


def pixels(loader) -> torch.Tensor:
    return torch.cat([b.pixels for b in loader])


def epoch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if type(t).__name__ == "EpochIterator"]


@pytest.mark.parametrize("after", [0, 4])
def test_a_thread_that_dies_is_an_error_at_once(spec, monkeypatch, after):
    """FFCV itself would wait for it forever."""
    from ffcv.loader.epoch_iterator import EpochIterator

    run, died = EpochIterator.run_pipeline, []

    def dies(self, b_ix, *rest):
        if b_ix == after:
            raise MemoryError("no memory is left")
        return run(self, b_ix, *rest)

    monkeypatch.setattr(EpochIterator, "run_pipeline", dies)
    monkeypatch.setattr(threading, "excepthook", lambda of: died.append((of.exc_value, time.monotonic())))
    loader, served = open_loader("ffcv", spec, workers=1), 0
    with pytest.raises(RuntimeError, match="FFCV's thread ended early"):
        for batch in loader:
            served += len(batch)
    assert served == 2 * after and isinstance(died[0][0], MemoryError)
    assert time.monotonic() - died[0][1] < 2
    monkeypatch.undo()
    assert loader.state_dict() == {"epoch": 0, "batch": after}  # and it can go on
    loader.load_state_dict({"epoch": 0, "batch": 0})
    assert torch.equal(pixels(loader), pixels(open_loader("torch", spec)))


def test_the_last_batch_of_a_thread_that_ends_meanwhile_is_not_lost():
    class Thread:
        """Leaves its last batch, and ends, after it was waited for in vain."""

        output_queue, asked = Queue(), 0

        def is_alive(self) -> bool:
            self.asked += 1
            if self.asked == 2:
                self.output_queue.put((0, (np.arange(3),)))
            return self.asked < 2

    assert _next(Thread()).tolist() == [0, 1, 2]


def test_batches_outlive_the_ring(spec):
    """FFCV writes every sixth batch into the same memory."""
    loader = open_loader("ffcv", spec, workers=1)
    kept = [b.pixels for b in loader]
    copies = [p.clone() for p in kept]
    list(loader)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert torch.equal(torch.cat(kept), pixels(open_loader("torch", spec)))


def test_compiled_code_shows_all_that_is_sound(spec, monkeypatch):
    """The slow way of a sample that it could not show would give the same bytes, and hide that."""
    monkeypatch.setattr(ffcv_loader.FfcvLoader, "_mend", None)
    grown = replace(spec, still=40, growth=Growth(16, start=0, end=2, step=8), batch=7)
    ours, reference = open_loader("ffcv", grown, workers=2), open_loader("torch", grown)
    for side in (16, 24, 32):
        for a, b in zip(ours, reference, strict=True):
            assert a.pixels.shape[2:] == (side, side)
            assert torch.equal(a.pixels, b.pixels) and torch.equal(a.still, b.still)


def test_memory_is_used_again_when_nobody_holds_it():
    memory, bytes_ = ffcv_loader._Memory(), torch.arange(200, dtype=torch.uint8)
    assert len({memory.copy_of(bytes_).data_ptr() for _ in range(9)}) <= 2
    held = [memory.copy_of(bytes_[i:]) for i in range(50)]
    part = held[-1].view(1, -1)[0, 7:9].numpy()  # a part of a batch holds it, too
    assert all(torch.equal(h, bytes_[i:]) for i, h in enumerate(held))
    del held
    again = [memory.copy_of(bytes_[:50]) for _ in range(20)]
    assert part.tolist() == [56, 57] and all(torch.equal(a, bytes_[:50]) for a in again)
    assert len(memory._lent) <= 8


def test_rows_are_computed_a_little_ahead(spec, monkeypatch):
    """Also where an epoch is longer than what is computed at once."""
    monkeypatch.setattr(ffcv_loader, "AT_ONCE", 4)
    filled = []
    fill = ffcv_loader.FfcvLoader._fill

    def watched(self, *arguments):
        filled.append(fill(self, *arguments))
        return filled[-1]

    monkeypatch.setattr(ffcv_loader.FfcvLoader, "_fill", watched)
    assert torch.equal(
        pixels(open_loader("ffcv", replace(spec, batch=1), workers=2)), pixels(open_loader("torch", spec))
    )
    assert filled == [7, 14, 21, 24]


def test_threads_get_alike_shares():
    """Dealt dearest first, there and back again: nobody gets all the dear ones."""
    dealt = _deal(np.arange(12), 8, 2)
    assert dealt.tolist() == [0, 3, 4, 7, 1, 2, 5, 6, 8, 11, 9, 10]
    for batch, hands in ((7, 3), (1, 4), (5, 5)):
        dealt = _deal(np.arange(20), batch, hands)
        assert all(sorted(dealt[b : b + batch]) == list(range(20))[b : b + batch] for b in range(0, 20, batch))


def test_nothing_in_the_process_changes(spec):
    """FFCV sets PyTorch's threads to those of its loader."""
    torch.set_num_threads(2)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    loader = open_loader("ffcv", spec, workers=1)
    list(loader)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]
    assert not epoch_threads()


def test_numbas_types_stay_what_they_are(spec):
    """FFCV sets numba's type of uint8 vectors to read-only, one object for the whole process, and then tables of compiled
    functions do not find what they hold; walking through one may never end."""
    list(open_loader("ffcv", spec, workers=1))
    assert numba.types.uint8[::1].mutable
    tables = [f.overloads for f in (huffman.two, huffman.walk, huffman.read_head, baseline.decode_part) if f.overloads]
    assert tables
    for table in tables:
        keys = list(itertools.islice(table, len(table) + 1))
        assert len(keys) == len(table) and all(key in table for key in keys)


def test_importing_it_changes_nothing_either():
    """FFCV sets PyTorch's threads to 1 when it is imported: training on the CPU would go on with one."""
    code = """
import torch
from fasttrain.doctor import available
from fasttrain.loaders.parts import missing_part
torch.set_num_threads(2)
print(missing_part("ffcv"), available("ffcv")[0], torch.get_num_threads())
import ffcv.pipeline.compiler
ffcv.pipeline.compiler.Compiler.set_num_threads(1)
print(torch.get_num_threads())
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["True", "2", "1"], ran.stderr  # the 1: what FFCV does if nobody minds


def test_one_thread_while_it_iterates(spec):
    loader = open_loader("ffcv", spec, workers=2)
    assert not epoch_threads()  # nothing is started, and nothing compiled, before a batch is asked for
    for _ in loader:
        assert len(epoch_threads()) <= 1
    old = iter(loader)
    next(old)
    new = iter(loader)
    next(new)
    assert len(epoch_threads()) == 1
    loader.close()
    assert not epoch_threads()
    for iterator in (old, new):
        with pytest.raises(RuntimeError):
            next(iterator)


def test_files_that_ffcv_wrote(tmp_path):
    """Other names, another order and more fields; JPEGs and pixels in one file; no FILE.json beside it."""
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = [np.kron(i, np.ones((6, 6, 1), dtype=np.uint8)) for i in samples.pixels(10, 8)]
    sides = [(48, 48 - 2 * (i % 3)) for i in range(10)]
    rows = [(i % 3, image[i][: sides[i][0], : sides[i][1]], i / 10) for i in range(10)]
    fields = {
        "kind": IntField(),
        "photo": RGBImageField(write_mode="proportion", compress_probability=0.6),
        "weight": FloatField(),
    }
    DatasetWriter(str(tmp_path / "theirs.beton"), fields, num_workers=1).from_indexed_dataset(rows)
    dataset = open_dataset("beton", tmp_path / "theirs.beton")
    assert dataset.targets_N.tolist() == [i % 3 for i in range(10)]
    assert 0 < dataset.read.raw_N.sum() < 10
    assert [dataset.read.size(i) for i in range(10)] == sides
    spec = LoaderSpec(dataset, np.arange(10), ViewPlan(flip="both"), size=30, stored=0, batch=4)
    ours = open_loader("ffcv", spec, workers=2)
    assert "jpeg and raw" in ours.describe()
    assert torch.equal(pixels(ours), pixels(open_loader("torch", spec)))


def test_what_it_cannot_serve(spec, monkeypatch):
    with pytest.raises(ValueError, match=r"^data\.loader: ffcv reads packed data sets; pack toy with `fasttrain pack`"):
        open_loader("ffcv", replace(spec, dataset=open_dataset("toy")))
    with pytest.raises(ValueError, match=r"^data\.stored: .* pack them with --square 24, or use the torch loader"):
        open_loader("ffcv", replace(spec, stored=24))
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(ValueError, match=r"^data\.loader: ffcv needs FFCV: pip install 'fasttrain\[ffcv\]' \("):
        open_loader("ffcv", spec)


def test_it_says_what_it_does(spec):
    said = open_loader("ffcv", spec, workers=3).describe()
    assert (
        said.startswith("ffcv 1.")
        and "jpeg, seek index, 3 threads" in said
        and str(spec.dataset.read.file.path) in said
    )
