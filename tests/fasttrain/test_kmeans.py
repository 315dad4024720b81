"""k-means: what scikit-learn finds, the same bits however it is cut, and goes on where it stopped."""

import os
import signal
import sys
from statistics import median

import numpy as np
import pytest
import torch
from fasttrain.benchmarks.clusters import run as bench
from fasttrain.loaders import open_dataset
from fasttrain.loaders.order import order
from PIL import Image
from sklearn.cluster import KMeans, kmeans_plusplus
from torch import Tensor

from fasttrain import device
from fasttrain.pretext import kmeans as module
from fasttrain.pretext.kmeans import Clusters, kmeans, nearest, plus_plus


def blobs(count: int = 12, size: int = 20, n: int = 1500) -> Tensor:
    return (3 * torch.randn(count, size))[torch.randint(count, (n,))] + torch.randn(n, size)


def cells() -> Tensor:
    """Photographs of solar cells, shrunk to 10 x 10 grey values from 0 to 1, as positive and as alike as features are."""
    data = open_dataset("elpv")
    images = [Image.open(data.read.paths[i]).resize((10, 10)) for i in data.splits["train"][:600]]
    return torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32).ravel() / 255 for image in images]))


DATA = {"blobs": blobs, "noise": lambda: torch.randn(1500, 30), "photographs": cells}


def brute(x: Tensor, c: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """All distances, in float64."""
    distance = ((x.double()[:, None] - c.double()) ** 2).sum(2)
    index = torch.argsort(distance, stable=True)[:, :count]
    return index, distance.gather(1, index)


def close_calls(n: int = 700, size: int = 37) -> tuple[Tensor, Tensor]:
    """Features halfway between two centroids, to the last bits: a matrix product in float32 cannot tell them apart."""
    c = torch.randn(50, size) + 5
    a, b = torch.randint(50, (2, n))
    return (c[a] + c[b]) / 2, c


def same(a: Clusters, b: Clusters) -> bool:
    tensors = torch.equal(a.centroid_KD, b.centroid_KD) and torch.equal(a.count_K, b.count_K)
    return tensors and (a.inertia, a.iterations, a.settled) == (b.inertia, b.iterations, b.settled)


@pytest.mark.parametrize("count", [1, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nearest_is_what_all_distances_in_float64_say(count, dtype):
    for x, c in (close_calls(), (torch.randn(300, 37), torch.randn(50, 37))):
        x = x.to(dtype)
        index, distance = nearest(x, c, count)
        expected, its_distance = brute(x, c, count)
        assert index.dtype == torch.int64 and distance.dtype == torch.float32
        torch.testing.assert_close(distance, its_distance.float(), rtol=1e-6, atol=0)
        # sums of float64 in another order may differ in their last bits
        doubt = ((brute(x, c, 50)[1].diff() < 1e-12).any(1))[:, None] & (index != expected)
        assert ((index == expected) | doubt).all() and doubt.float().mean() < 0.02


def test_a_plain_product_does_get_close_calls_wrong():
    x, c = close_calls()
    plain = (c.square().sum(1) - 2 * x @ c.T).argmin(1)
    assert (plain != brute(x, c, 1)[0][:, 0]).float().mean() > 0.05


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_numbers_whose_squares_float32_does_not_hold(scale):
    x, c = torch.randn(100, 8), torch.randn(20, 8)
    assert torch.equal(nearest(x * scale, c * scale)[0], nearest(x, c)[0])


def test_of_equally_near_centroids_the_first():
    c = torch.randn(30, 5).repeat(3, 1)
    index, distance = nearest(c, c, 3)
    assert torch.equal(index, (torch.arange(90) % 30)[:, None] + torch.tensor([0, 30, 60]))
    assert (distance == 0).all()


@pytest.mark.parametrize("count", [1, 4])
def test_what_is_nearest_does_not_depend_on_the_batch(count):
    x, c = close_calls()
    whole = nearest(x, c, count)
    order = torch.randperm(len(x))
    for cut in (1, 7, 64, 333):
        parts = [nearest(part, c, count) for part in x[order].split(cut)]
        for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(together[order], torch.cat(apart))
    torch.set_num_threads(2)
    with torch.autocast("cpu", torch.bfloat16):
        again = nearest(x, c, count)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_less_exact_products_do_not_change_it():
    x, c = close_calls()
    whole = nearest(x, c)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(nearest(x, c)[0], whole[0])
    finally:
        torch.set_float32_matmul_precision("highest")


def test_by_hand():
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [30.0]])
    found = kmeans(x, 3, seed=0, iterations=10, start_KD=torch.tensor([[0.0], [9.0], [20.0]]))
    assert found.centroid_KD.tolist() == [[1.0], [10.5], [30.0]] and found.count_K.tolist() == [3, 2, 1]
    assert found.inertia == 2.5 and found.settled and found.iterations == 2


def test_an_empty_cluster_gets_the_farthest_feature():
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    start = torch.tensor([[1.0], [1000.0]])
    found = kmeans(x, 2, seed=0, iterations=1, start_KD=start)
    assert found.centroid_KD.tolist() == [[1.0], [10.0]]
    theirs = KMeans(2, init=start.numpy(), n_init=1, max_iter=1).fit(x.numpy())
    assert theirs.cluster_centers_.tolist() == found.centroid_KD.tolist()


def test_empty_clusters_far_out_are_all_filled():
    x = blobs()
    start = torch.cat([x[:4], x[:8] + 1e4])
    found = kmeans(x, 12, seed=0, iterations=100, start_KD=start)
    assert found.count_K.min() > 0 and found.settled


def test_fewer_places_than_clusters():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(20, 1)
    found = kmeans(x, 5, seed=3, iterations=10)
    assert found.inertia == 0 and found.settled and sorted(found.count_K.tolist()) == [0, 0, 0, 20, 20]


@pytest.mark.parametrize("name", DATA)
def test_agrees_with_scikit_learn_from_the_same_start(name, need):
    need("elpv")
    x, count = DATA[name](), 20
    start = plus_plus(x, count, seed=5)
    found = kmeans(x, count, seed=5, iterations=300)
    theirs = KMeans(count, init=start.numpy(), n_init=1, algorithm="lloyd", max_iter=300, tol=0).fit(x.numpy())
    assert found.settled and found.inertia == pytest.approx(theirs.inertia_, rel=0.01)
    index, distance = nearest(x, found.centroid_KD)
    assert found.inertia == pytest.approx(distance.double().sum().item(), rel=1e-6)
    assert torch.equal(found.count_K, torch.bincount(index[:, 0], minlength=count))
    few = kmeans(x, count, seed=5, iterations=3)
    theirs = KMeans(count, init=start.numpy(), n_init=1, algorithm="lloyd", max_iter=3, tol=0).fit(x.numpy())
    assert not few.settled and few.inertia == pytest.approx(theirs.inertia_, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_order_and_no_number_of_threads_changes_a_bit(dtype, monkeypatch):
    x = blobs().to(dtype)
    start, mixed = plus_plus(x, 12, seed=1), torch.randperm(len(x))
    whole = kmeans(x, 12, seed=1, iterations=100)
    assert same(whole, kmeans(x, 12, seed=1, iterations=100, start_KD=start))
    permuted = kmeans(x[mixed], 12, seed=1, iterations=100, start_KD=start)
    assert torch.equal(permuted.centroid_KD, whole.centroid_KD) and torch.equal(permuted.count_K, whole.count_K)
    torch.set_num_threads(2)
    monkeypatch.setattr(module, "_chunks", lambda x, k: (slice(at, at + 100) for at in range(0, len(x), 100)))
    assert same(whole, kmeans(x, 12, seed=1, iterations=100))
    assert not torch.equal(start, plus_plus(x, 12, seed=2))


@pytest.mark.parametrize("name", DATA)
def test_starts_are_as_good_as_scikit_learns(name, need):
    need("elpv")
    x = DATA[name]()

    def inertia(centroids: Tensor) -> float:
        return nearest(x, centroids)[1].sum().item()

    ours = median(inertia(plus_plus(x, 15, seed=seed)) for seed in range(15))
    theirs = [kmeans_plusplus(x.numpy(), 15, random_state=seed)[0] for seed in range(15)]
    assert ours == pytest.approx(median(inertia(torch.from_numpy(c)) for c in theirs), rel=0.1)
    random = median(inertia(x[torch.randperm(len(x))[:15]]) for _ in range(15))
    assert name != "blobs" or ours < 0.8 * random


def test_a_start_is_of_a_sample():
    x = torch.randn(20000, 2)
    chosen = {tuple(row) for row in x[order(4, 0, len(x))[:16384]].tolist()}
    start = plus_plus(x, 60, seed=4)
    assert {tuple(row) for row in start.tolist()} <= chosen and len(start.unique(dim=0)) == 60


def test_goes_on_where_ctrl_c_stopped_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_EVERY_S", 0)
    x, path, said = blobs(), tmp_path / "state.pt", []
    whole = kmeans(x, 30, seed=0, iterations=100)
    assert whole.iterations > 6

    def stop(text: str) -> None:
        if "pass 3," in text:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        kmeans(x, 30, seed=0, iterations=100, state=path, report=stop)
    assert path.exists()
    assert same(whole, kmeans(x, 30, seed=0, iterations=100, state=path, report=said.append))
    assert said[0] == "k-means goes on after pass 3" and "pass 4," in said[1] and not any(tmp_path.iterdir())


def test_goes_on_from_the_start_that_it_had(tmp_path, monkeypatch):
    x, path, said = blobs(), tmp_path / "state.pt", []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Search, "labels", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        kmeans(x, 30, seed=0, iterations=100, state=path)
    found = kmeans(x, 30, seed=0, iterations=100, state=path, report=said.append)
    assert same(found, kmeans(x, 30, seed=0, iterations=100)) and said[0] == "k-means goes on after pass 0"


def test_goes_on_after_it_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_EVERY_S", 0)
    x, path, said = blobs(), tmp_path / "state.pt", []

    def die(text: str) -> None:
        if "pass 4," in text:
            raise RuntimeError(text)

    with pytest.raises(RuntimeError):
        kmeans(x, 30, seed=0, iterations=5, state=path, report=die)
    found = kmeans(x, 30, seed=0, iterations=5, state=path, report=said.append)
    assert same(found, kmeans(x, 30, seed=0, iterations=5)) and said[0] == "k-means goes on after pass 3"


@pytest.mark.parametrize("change", ["seed", "features", "count", "damaged"])
def test_a_state_of_something_else_is_not_taken(change, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_EVERY_S", 0)
    x, path, said = blobs(), tmp_path / "state.pt", []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Lloyd, "result", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        kmeans(x, 30, seed=0, iterations=2, state=path)
    if change == "damaged":
        path.write_bytes(path.read_bytes()[:1000])
    x, seed, count = x.flip(0) if change == "features" else x, int(change == "seed"), 30 + (change == "count")
    found = kmeans(x, count, seed=seed, iterations=2, state=path, report=said.append)
    assert same(found, kmeans(x, count, seed=seed, iterations=2))
    assert said[0].startswith("k-means begins anew") and not any(tmp_path.iterdir())


def test_mistakes():
    with pytest.raises(ValueError, match=r"pretext\.clusters: 11, but there are only 10 features"):
        kmeans(torch.randn(10, 3), 11, seed=0, iterations=1)
    with pytest.raises(ValueError, match=r"pretext\.clusters: 11"):
        plus_plus(torch.randn(10, 3), 11, seed=0)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(10, 3)
        x[7, 1] = bad
        with pytest.raises(ValueError, match="finite numbers; those at index 7"):
            kmeans(x, 2, seed=0, iterations=1)


@pytest.fixture
def clusters_bench(monkeypatch):
    monkeypatch.setattr(device, "keep_memory", lambda: True)  # other tests look at this process's memory
    return lambda *more: bench([*TINY, *more])


TINY = ["--images", "400", "--size", "8,16", "--clusters", "5", "--passes", "2", "--rounds", "3"]


def test_the_benchmark_has_a_row_for_each(clusters_bench, capsys):
    content = clusters_bench()
    assert content["not_run"] == {} and content["passes"] == 2
    rows = {row["name"]: row for row in content["rows"]}
    names = [f"{n}, D={d} K=5" for d in (8, 16) for n in ("ours", "scikit-learn", "scikit-learn mini-batch")]
    assert list(rows) == names
    for name, row in rows.items():
        ours = rows["ours" + name[name.index(",") :]]
        assert len(row["repeats"]) == 3 and min(row["repeats"]) > 0 and row["inertia"] > 0
        expected = {} if row is ours else {ours["name"]: pytest.approx(ours["ms"] / row["ms"])}
        assert row["relative_to"] == expected
    exact = [rows[f"{n}, D=16 K=5"]["inertia"] for n in ("ours", "scikit-learn")]
    assert exact[0] == pytest.approx(exact[1], rel=1e-3)
    assert "scikit-learn mini-batch" in capsys.readouterr().out


def test_the_benchmark_without_scikit_learn(clusters_bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    content = clusters_bench()
    assert [row["name"] for row in content["rows"]] == ["ours, D=8 K=5", "ours, D=16 K=5"]
    assert list(content["not_run"]) == ["scikit-learn", "scikit-learn mini-batch"]


@pytest.mark.parametrize(("arguments", "said"), [(["--clusters", "500"], "more"), (["--fast"], "--fast; see")])
def test_the_benchmark_names_mistakes(arguments, said, clusters_bench):
    with pytest.raises(ValueError, match=said):
        clusters_bench(*arguments)
