"""Fields of ``data`` that choose samples, sizes and loaders: what reaches the loaders, and what is refused."""

import os

import numpy as np
import pytest
from fasttrain.loaders.choose import chosen_here

from fasttrain.build import build, loader_specs, loader_workers, open_data
from fasttrain.doctor import examine
from fasttrain.samples import chosen_indices


def train_spec(recipe):
    return loader_specs(recipe, open_data(recipe))[0]


def test_an_index_list_chooses_the_samples(smoke, tmp_path):
    everything = train_spec(smoke()).index_N
    (tmp_path / "some.txt").write_text("\n".join(map(str, everything[::-3])) + "\n\n")
    spec = train_spec(smoke("--data.indices", str(tmp_path / "some.txt")))
    assert spec.index_N.tolist() == sorted(everything[::-3].tolist())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("1 2 x", "cannot read .*some.txt: .*'x'"),
        ("", "names no sample"),
        ("3 4 3", "names 3 twice"),
        ("3 900", "names 900, which is no sample of the training split"),
        (str(1 << 70), "cannot read"),
    ],
)
def test_a_wrong_index_list(tmp_path, content, said):
    (tmp_path / "some.txt").write_text(content)
    with pytest.raises(ValueError, match=rf"^data\.indices: .*{said}"):
        chosen_indices(tmp_path / "some.txt", np.arange(10))
    with pytest.raises(ValueError, match=r"^data\.indices: cannot read .*none"):
        chosen_indices(tmp_path / "none", np.arange(10))


def test_images_grow(smoke):
    grow = ("--data.grow_from", "16", "--data.grow_epochs", "[1, 5]", "--data.views", "0")
    recipe = smoke("--data.size", "40", *grow)
    spec = train_spec(recipe)
    assert [spec.size_at(e) for e in range(7)] == [16, 16, 32, 32, 32, 40, 40]
    assert all(s.growth is None for s in loader_specs(recipe, open_data(recipe))[1].values())


@pytest.mark.parametrize("wrong", [("16", "[5, 1]"), ("16", "[1]"), ("40", "[1, 5]"), ("16", "[-1, 5]")])
def test_wrong_growth(smoke, wrong):
    with pytest.raises(ValueError, match=r"^data\.grow_from, data\.grow_epochs"):
        smoke("--data.size", "40", "--data.grow_from", wrong[0], "--data.grow_epochs", wrong[1], "--data.views", "0")


def test_recalled_sources_need_a_size_that_does_not_grow(smoke):
    grow = ("--data.size", "40", "--data.grow_from", "16", "--data.grow_epochs", "[1, 5]", "--data.stored", "40")
    with pytest.raises(ValueError, match=r"^data\.grow_from: recalled sources need transfer\.still"):
        smoke(*grow)
    assert smoke(*grow, "--transfer.still", "40").data.grow_from == 16


def test_other_fields_reach_the_loaders(smoke):
    spec = train_spec(smoke("--data.balance", "true", "--data.on_bad_sample", "skip"))
    assert spec.balance and spec.on_bad_sample == "skip"
    evals = loader_specs(smoke("--data.balance", "true", "--data.on_bad_sample", "skip"), open_data(smoke()))[1]
    assert all(not s.balance and s.on_bad_sample == "skip" for s in evals.values())


def test_workers(smoke):
    cores = len(os.sched_getaffinity(0))
    assert loader_workers(smoke()) == cores
    assert loader_workers(smoke("--run.parallel", str(2 * cores))) == 1
    assert loader_workers(smoke("--data.workers", "0")) == 0
    with pytest.raises(ValueError, match=r"data\.workers: -2 is below -1"):
        smoke("--data.workers", "-2")


def test_loaders_that_cannot_serve_this(smoke):
    with pytest.raises(ValueError, match="ffcv reads packed data sets; pack toy with `fasttrain pack`"):
        build(smoke("--data.loader", "ffcv"))
    with pytest.raises(ValueError, match="no loader is called 'numba'"):
        build(smoke("--data.loader", "numba"))


def test_synthetic_data_train(smoke):
    parts = build(smoke("--data.loader", "synthetic"))
    first, second = list(parts.loaders["train"])[:2]
    assert first.pixels is second.pixels and len(parts.loaders["train"]) > 2
    assert any("synthetic: one batch of random pixels" in line for line in parts.log)


def test_doctor_says_what_auto_takes(monkeypatch):
    said = examine()["uses"]["loader"]
    assert "resident where" in said and "packed files: " in said
    monkeypatch.setattr("fasttrain.loaders.choose.missing_part", lambda module: f"no {module}")
    said = examine()["uses"]["loader"]
    assert "packed files: torch, which is SLOW (no ffcv: no ffcv" in said and "other files: torch" in said
    assert "no dali: no nvidia.dali" in chosen_here("cuda")
