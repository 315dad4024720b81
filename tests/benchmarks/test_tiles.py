"""Tile shapes: which are tried, what compiles, and how the best rule is found. Timing needs a GPU."""

import pytest
import torch
from fasttrain.benchmarks.tiles import Variant, best_rules, rules, run, tiles_for
from fasttrain.kernels.tiles import DEFAULT, Tiles, Tiling, tiles_of


def test_the_default_is_what_registers_chose():
    assert rules()[0] == DEFAULT
    assert tiles_of((1000, 365)) == Tiles(1, 1024, 1, 512, 2, 0, 4)
    assert tiles_of((4096,)) == Tiles(1, 4096, 1, 4096, 2, 0, 16)
    assert tiles_of((10, 21841)) == Tiles(1, 1024, 16, 16, 2, 1, 8)
    assert tiles_of((10,), (4,)) == Tiles(16, 16, 16, 16, 4, 0, 4)


def test_every_rule_gives_tiles_that_can_be():
    for tiling in rules():
        for classes in (1, 365, 1365, 4096, 21841):
            for pad in (0, -classes % 8):
                tiles = tiles_for(classes, pad, tiling, torch.bfloat16)
                for x in (tiles.r, tiles.n, tiles.r_small, tiles.n_small, tiles.warps):
                    assert x & (x - 1) == 0 and x > 0
                assert tiles.warps <= 32 and tiles.r * tiles.n // (32 * tiles.warps) <= 32
                largest = 1000 if classes == 1365 else classes
                assert tiles.loop == (largest + 7 * (tiles.wide > 1) * tiles.edges > tiles.n)


def test_without_a_gpu_variants_are_compiled(need, capsys, monkeypatch):
    """Elements one by one (4 bytes are a number's), or in groups of 16 bytes."""
    need("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    content = run(["--classes", "1365", "--tries", "2", "--jobs", "1"])
    assert content["rows"] == [] and "nothing is timed" in content["not_run"]["timing"]
    found = {row["name"]: row["launches"] for row in content["compiled"]}
    tiles = "1x1024 and 1x512, 4 warps"
    names = [tiles, f"{tiles}, padded rows", f"{tiles}, wide", f"{tiles}, wide, padded rows"]
    assert sorted(found) == [f"{name}, C=1365" for name in names]
    for name, launches in found.items():
        assert len(launches) == 2 and not any(r["spilled"] for r in launches)
        assert {r["load_bytes"] for r in launches} == ({16} if "wide" in name else {4})
        assert all(r["architecture"] == 90 and r["warps"] == 4 for r in launches)
    assert "wide, padded rows" in " ".join(capsys.readouterr().out.split())


def test_the_best_rule_is_best_over_all_problems():
    first, second, third = DEFAULT, Tiling(per_thread=16, least_warps=1), Tiling(per_thread=32, least_warps=1)

    def variant(classes: int, tiling: Tiling) -> Variant:
        return Variant(classes, 0, tiles_for(classes, 0, tiling, torch.bfloat16), tiling)

    times = {(512, variant(1365, first)): 4.0, (512, variant(1365, second)): 2.0, (512, variant(1365, third)): 1.0}
    times |= {(512, variant(4096, first)): 1.0, (512, variant(4096, second)): 1.0}  # the third spilled there
    best = best_rules(times, [first, second, third], torch.bfloat16)
    assert [row["over_best"] for row in best] == [pytest.approx(2**0.5), 2.0]
    assert best[0]["tiling"]["per_thread"] == 16 and best[1]["default"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--batch", "0"], "numbers must be above 0"), (["--what"], "bench tiles: --what"), (["--dtype", "x"], "dtype")],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(arguments)
