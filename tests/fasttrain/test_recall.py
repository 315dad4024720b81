"""Recalled sources: filled as labels are met or ahead, by this run or another, they say what live sources say."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain.kernels import TopK
from fasttrain.loaders import ViewPlan

from fasttrain import caching
from fasttrain.build import Parts, build
from fasttrain.sources import RecalledSources, SourceBank
from fasttrain.sources import recall as recall_module
from fasttrain.sources.cache import CacheError, Form, SoftLabelFile
from fasttrain.sources.recall import about

TWO = (
    "[{name: a, model: test_resnet, weights: random, size: 32}, "
    "{name: b, model: test_resnet, weights: random, classes: 20, size: 40}]"
)


@pytest.fixture
def parts_of(smoke):
    return lambda *overrides: build(smoke(*overrides))


def opened(parts: Parts, folder: Path, said: list | None = None, **how) -> RecalledSources:
    sources = parts.open_sources(folder, (lambda text: None) if said is None else said.append, **how)
    assert isinstance(sources, RecalledSources)
    return sources


def epochs(parts: Parts, count: int):
    for _ in range(count):
        yield from parts.loaders["train"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_recalled_is_live_bit_for_bit(parts_of, tmp_path, in_memory):
    """While labels are met, while they are recalled, and in a second run that finds them all: two sources side by side."""
    parts = parts_of("--sources", TWO, "--data.flip", "both", "--data.batch", "50")
    live, recall = SourceBank(parts.networks, torch.float32), opened(parts, tmp_path, in_memory=in_memory)
    assert (recall.names, recall.class_counts) == (("a", "b"), (1000, 20))
    for batch in epochs(parts, 4):
        assert torch.equal(recall(batch).logits_BC, live(batch).logits_BC)
    assert recall.computed == 2 * len(parts.train_spec.index_N)
    assert "all known" in recall.describe()
    again = opened(parts_of("--sources", TWO, "--data.flip", "both", "--run.seed", "4"), tmp_path, in_memory=in_memory)
    for batch in epochs(parts, 2):
        assert torch.equal(again(batch).logits_BC, live(batch).logits_BC)
    assert again.computed == 0


def test_what_another_run_adds_meanwhile_is_found(parts_of, tmp_path):
    """Two runs on one cache: neither computes what the other has."""
    parts = parts_of()
    first, second = opened(parts, tmp_path), opened(parts, tmp_path)
    live = SourceBank(parts.networks, torch.float32)
    for k, batch in enumerate(epochs(parts, 2)):
        (first, second)[k % 2](batch)
        assert torch.equal((second, first)[k % 2](batch).logits_BC, live(batch).logits_BC)
    assert first.computed + second.computed == 2 * len(parts.train_spec.index_N)
    assert first.computed > 0 and second.computed > 0


def test_a_bank_of_one_shape_is_shown_whole_batches(parts_of, tmp_path, monkeypatch):
    """A GPU's compiled sources would be compiled anew for every number of missing labels."""
    parts, others = parts_of(), parts_of("--data.batch", "20", "--run.seed", "7")
    some, recall = opened(others, tmp_path), opened(parts, tmp_path)
    live = SourceBank(parts.networks, torch.float32)
    some(next(iter(others.loaders["train"])))
    recall.bank.one_shape, logits, shown = True, recall.bank.logits, []
    monkeypatch.setattr(recall.bank, "logits", lambda pixels: shown.append(len(pixels)) or logits(pixels))
    batches = list(parts.loaders["train"])
    for batch in batches:
        assert torch.equal(recall(batch).logits_BC, live(batch).logits_BC)
    assert shown == [len(batch) for batch in batches]
    assert some.computed == 20 and recall.computed == sum(shown) - 20


def test_parts_of_a_data_set_share_their_labels(parts_of, tmp_path):
    """A run on fewer images, with other settings of everything that the sources do not see."""
    parts = parts_of("--data.labelled", "60")
    some = opened(parts, tmp_path)
    list(map(some, epochs(parts, 2)))
    other = ("--optim.lr", "0.01", "--run.seed", "9", "--data.batch", "20", "--transfer.temperature", "2")
    whole_parts = parts_of(*other, "--target.model", "resnet32", "--transfer.module", "true")
    whole = opened(whole_parts, tmp_path)
    list(map(whole, epochs(whole_parts, 2)))
    assert whole.computed == 2 * (len(whole_parts.train_spec.index_N) - 60)
    assert len(list(tmp_path.iterdir())) == 1


def test_float16_and_top_k(parts_of, tmp_path):
    parts = parts_of("--run.precision", "bf16")
    recall, live = opened(parts, tmp_path), SourceBank(parts.networks, torch.bfloat16)
    for batch in epochs(parts, 2):
        assert torch.equal(recall(batch).logits_BC, live(batch).logits_BC.half())
    parts = parts_of("--transfer.recall_top", "7", "--sources", TWO)
    live = SourceBank(parts.networks, torch.float32)
    for in_memory in (True, False):
        recall = opened(parts, tmp_path, in_memory=in_memory)
        for batch in epochs(parts, 3):
            target, logits_BC = recall(batch).target_BC, live(batch).logits_BC
            assert isinstance(target, TopK) and target.counts == (7, 7)
            value_BK, index_BK = logits_BC[:, 1000:].softmax(1).topk(7)
            assert torch.equal(target.index_BK[:, 7:].long(), index_BK)
            assert torch.equal(target.value_BK[:, 7:], value_BK.half())


@pytest.mark.parametrize(
    "change",
    [
        ("--data.views", "3"),
        ("--data.seed", "1"),
        ("--data.pad", "1"),
        ("--transfer.still", "30"),
        ("--data.size", "20"),
        ("--data.val_share", "0.3"),
        ("--transfer.recall_top", "5"),
        ("--run.precision", "bf16"),
        ("--data.views", "0", "--transfer.every_view", "true"),
        ("--sources", "[{name: tiny, model: test_resnet, weights: random, size: 40}]"),
        ("--sources", "[{name: tiny, model: test_resnet, weights: random, size: 32, mean: [1, 2, 3]}]"),
        ("--sources", "[{name: tiny, model: test_efficientnet, weights: random, size: 32}]"),
    ],
)
def test_labels_of_anything_else_are_not_taken(parts_of, tmp_path, change):
    """In the run's own folder that is said; in one that the recipe names it is refused."""
    opened(parts_of(), tmp_path).close()
    said: list[str] = []
    opened(parts_of(*change), tmp_path, said)
    assert len(list(tmp_path.iterdir())) == 2
    assert len(said) == 1 and "holds other soft labels of tiny: " in said[0] and said[0].endswith("; not used")
    with pytest.raises(
        CacheError, match=r"transfer\.cache: .*holds other soft labels of tiny: .*choose another folder"
    ):
        opened(parts_of(*change, "--transfer.cache", str(tmp_path), "--data.flip", "none"), tmp_path)


def test_the_difference_is_named(parts_of, tmp_path):
    opened(parts_of(), tmp_path).close()
    with pytest.raises(CacheError, match=r"view\.pad is 2 there, 1 here; choose"):
        opened(parts_of("--data.pad", "1", "--transfer.cache", str(tmp_path)), tmp_path / "x")
    other = "[{name: tiny, model: 'timm:test_resnet', weights: FILE, size: 32}]"
    torch.save(build_weights(), tmp_path / "w.pth")
    with pytest.raises(CacheError, match=r"tiny: weights is [0-9a-f]{64} there, [0-9a-f]{64} here; choose"):
        opened(
            parts_of("--sources", other.replace("FILE", str(tmp_path / "w.pth")), "--transfer.cache", str(tmp_path)),
            tmp_path,
        )
    opened(parts_of("--transfer.cache", str(tmp_path)), tmp_path / "not this one")
    assert not (tmp_path / "not this one").exists()


def build_weights() -> dict[str, torch.Tensor]:
    import timm

    return timm.create_model("test_resnet").state_dict()


def test_every_view_is_the_view_of_the_run(parts_of, tmp_path):
    """Numbering changes no image; a number and its image belong together in every epoch and with ``only``."""
    common = ("--data.views", "0", "--data.pad", "1", "--data.flip", "both", "--data.labelled", "30")
    plain, numbered = parts_of(*common), parts_of(*common, "--transfer.every_view", "true")
    plan = numbered.train_spec.plan
    assert plan.count == 36
    seen: dict[tuple[int, int], torch.Tensor] = {}
    for a, b in zip(epochs(plain, 12), epochs(numbered, 12), strict=True):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.index, b.index)
        for index, view, pixels in zip(b.index.tolist(), b.view.tolist(), b.pixels, strict=True):
            assert torch.equal(seen.setdefault((index, view), pixels), pixels)
    assert {view for _, view in seen} == set(range(36))
    for only in (0, 17, 35):
        spec = replace(numbered.train_spec, plan=replace(plan, only=only), shuffle=False)
        for batch in numbered.open_loader(spec):
            assert (batch.view == only).all()
            for index, pixels in zip(batch.index.tolist(), batch.pixels, strict=True):
                assert torch.equal(seen.get((index, only), pixels), pixels)
    recall, live = opened(numbered, tmp_path), SourceBank(numbered.networks, torch.float32)
    caching.fill(numbered, recall, lambda text: None, lambda fill: None)
    assert recall.computed == 36 * 30
    for batch in epochs(numbered, 2):
        assert torch.equal(recall(batch).logits_BC, live(batch).logits_BC)
    assert recall.computed == 36 * 30


@pytest.mark.parametrize(
    ("crop", "flip", "count"), [("pad", "none", 81), ("pad", "horizontal", 162), ("centre", "both", 4)]
)
def test_how_many_views_there_are(crop, flip, count):
    plan = ViewPlan(crop=crop, pad=4, flip=flip, every=True)
    assert plan.count == count
    number_B = plan.number(seed=1, epoch=3, index_B=np.arange(20_000))
    assert set(number_B.tolist()) == set(range(count))
    with pytest.raises(ValueError, match="has views that can all be numbered"):
        replace(plan, crop="random_resized").number(seed=1, epoch=3, index_B=np.arange(2))


def test_filling_ahead_goes_on_where_it_was_stopped(parts_of, tmp_path, monkeypatch):
    monkeypatch.setattr(recall_module, "FILL_BATCH", 20)
    parts, said = parts_of("--transfer.still", "20"), []
    recall = opened(parts, tmp_path, in_memory=False)
    count = len(parts.train_spec.index_N)

    def stop(fill) -> None:
        if fill.done > count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caching.fill(parts, recall, said.append, stop)
    met = recall.computed
    assert count <= met < 2 * count
    again, fills = opened(parts, tmp_path, in_memory=False), []
    caching.fill(parts, again, said.append, fills.append)
    assert again.computed == 2 * count - met
    assert fills[-1].done == fills[-1].total == 2 * count
    caching.fill(parts, again, said.append, fills.append)
    assert len(said) == 3  # nothing to do, nothing said
    assert "2 views of 127 images from tiny" in said[0] and "MiB to be computed" in said[0]


def test_two_parts_fill_one_cache(parts_of, tmp_path):
    parts = parts_of()
    for i in range(2):
        recall = opened(parts, tmp_path, in_memory=False)
        caching.fill(parts, recall, lambda text: None, lambda fill: None, (i, 2))
        assert 0 < recall.computed < 254
    assert "all known" in recall.describe()


def test_a_cache_that_does_not_fit_on_the_disk_is_not_begun(parts_of, tmp_path, monkeypatch):
    from collections import namedtuple

    parts = parts_of()
    recall = opened(parts, tmp_path, in_memory=False)
    usage = namedtuple("usage", "total used free")(10**6, 0, 10**6)
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match=r"transfer\.cache: .* has room for 1\.0 MiB, and the soft labels of tiny take"
    ):
        caching.fill(parts, recall, lambda text: None, lambda fill: None)
    assert recall.computed == 0


@pytest.mark.parametrize("in_memory", [True, False])
def test_training_survives_a_disk_that_fills_up(parts_of, tmp_path, monkeypatch, in_memory):
    """Right labels at every step, said once; filling ahead stops with an error."""
    parts, said, written = parts_of(), [], []
    recall = opened(parts, tmp_path, said, in_memory=in_memory)
    live, write = SourceBank(parts.networks, torch.float32), os.pwrite

    def pwrite(to: int, content: bytes, offset: int) -> int:
        written.append(offset)
        if len(written) > 90:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(to, content, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    for batch in epochs(parts, 3):
        assert torch.equal(recall(batch).logits_BC, live(batch).logits_BC)
    assert len(said) == 1 and "(No space left on device); those already there stay usable" in said[0]
    assert said[0].endswith("keeps them in memory") == in_memory
    if not in_memory:
        with pytest.raises(OSError, match="No space left"):
            caching.fill(parts, opened(parts, tmp_path, in_memory=False), lambda text: None, lambda fill: None)


def test_what_is_not_recalled_says_why(parts_of, tmp_path):
    said: list[str] = []
    drifting = "[{name: tiny, model: test_resnet, weights: random, size: 32, batch_norm: batch}]"
    assert isinstance(parts_of("--sources", drifting).open_sources(tmp_path, said.append), SourceBank)
    assert len(said) == 1 and "batch_norm: batch" in said[0]
    assert isinstance(parts_of("--data.views", "0").open_sources(tmp_path, said.append), SourceBank)
    assert parts_of("--method.name", "scratch").open_sources(tmp_path, said.append) is None
    assert opened(parts_of("--transfer.recall_gib", "0"), tmp_path).tables is None
    assert opened(parts_of(), tmp_path).tables is not None


def test_any_loader_shows_the_same(parts_of, tmp_path):
    """Labels met through the torch loader are those that the resident one would have met."""
    resident, files = parts_of(), parts_of("--data.loader", "torch", "--data.workers", "0")
    list(map(opened(files, tmp_path), epochs(files, 2)))
    recall, live = opened(resident, tmp_path), SourceBank(resident.networks, torch.float32)
    for batch in epochs(resident, 2):
        assert torch.equal(recall(batch).logits_BC, live(batch).logits_BC)
    assert recall.computed == 0


def test_a_damaged_label_is_computed_anew(parts_of, tmp_path):
    parts = parts_of()
    recall, live = opened(parts, tmp_path), SourceBank(parts.networks, torch.float32)
    list(map(recall, epochs(parts, 2)))
    file = recall.files[0]
    start, size = file._records_at, file.form.record_bytes
    recall.close()
    content = bytearray(file.path.read_bytes())
    for index in parts.train_spec.index_N[:40].tolist():
        content[start + index * size + index] ^= 1
    file.path.write_bytes(content)
    again = opened(parts, tmp_path)
    for batch in epochs(parts, 2):
        assert torch.equal(again(batch).logits_BC, live(batch).logits_BC)
    assert again.computed == 40


def test_what_labels_depend_on_fits_into_the_header(parts_of, tmp_path):
    parts = parts_of("--sources", TWO)
    depends = about(parts.networks[0], parts.source_spec, torch.float32)
    assert len(json.dumps(depends)) < 2000
    SoftLabelFile(tmp_path / "a.soft", depends, views=1, samples=1, form=Form(3)).close()


def test_stills_are_decoded_only_while_a_label_is_missing(smoke, tmp_path):
    from .test_trainer import fit

    seen: list[int] = []
    for name in ("first", "second"):
        recipe = smoke(
            "--transfer.still", "20", "--optim.epochs", "3", "--transfer.cache", str(tmp_path / "c"), "--name", name
        )
        lines: list[dict] = []
        fit(recipe, None, lines)
        assert lines[-1]["kind"] == "done"
        seen.append(sum("others when they are first met" in line.get("text", "") for line in lines))
    assert seen == [1, 0]
