"""Suites ``step`` and ``sources`` on networks and images that take no time."""

import json

import pytest

TINY = ("--size", "24", "--models", "test_resnet,test_resnet", "--source-size", "32", "--batch", "16")


def few_photographs(cache) -> None:
    """48 photographs instead of 2,000, made of scikit-learn's two."""
    from pathlib import Path

    import sklearn.datasets
    from fasttrain.benchmarks import photographs

    folder = Path(sklearn.datasets.__file__).parent / "images"
    photographs.make(
        cache, 48, side=(80, 60), workers=1, photographs=sorted(folder.glob("*.jpg")), cache=cache.parent / "none"
    )


def test_step(fasttrain, tmp_path):
    """Through the real command line: rows run, and say what they should."""
    few_photographs(tmp_path / "photographs")
    rows = "live;recalled;heads alone"
    asked = ("--data", "photographs", "--images", "32", "--repeats", "1", "--compile", "false", "--rows", rows)
    done = fasttrain(
        "bench", "step", *TINY, *asked, "--json", "out.json", HOME=str(tmp_path), FASTTRAIN_BENCH_TURN="0.2"
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["not_run"] == {}
    found = {row["name"]: row for row in content["rows"]}
    assert list(found) == rows.split(";")
    assert all(row["images_per_s"] > 0 for row in found.values())
    assert found["live"]["shares"]["sources"] > found["recalled"]["shares"]["sources"]
    assert set(found["recalled"]["relative_to"]) == {"heads alone"}
    assert content["flops_per_image"]["source0"] > 0
    for row in found.values():
        floor = row["floor"]
        assert row["over_floor"] == pytest.approx(16e3 / row["images_per_s"] / floor["by_operation_ms"])
        assert floor["by_operation_ms"] >= max(floor["by_flops_ms"], floor["by_bytes_ms"]) > 0
    assert found["live"]["floor"]["by_flops_ms"] > found["recalled"]["floor"]["by_flops_ms"]
    assert found["recalled"]["floor"] == found["heads alone"]["floor"]
    assert "recalled" in done.stdout and "peak:" in done.stdout


def test_sources(capsys):
    from fasttrain.benchmarks import sources

    content = sources.run(["--models", "test_resnet,test_resnet", "--size", "32", "--pixels", "20", "--batch", "8",
                           "--repeats", "3", "--rows", "plain,folded,stacked,graphed"])  # fmt: skip
    assert [row["name"] for row in content["rows"]] == ["plain", "folded", "stacked"]
    assert "needs a CUDA device" in content["not_run"]["graphed"]
    assert all(row["error"] < 1e-4 for row in content["rows"])
    assert content["rows"][1]["relative_to"]["plain"] > 0
    assert "folded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("suite", "given", "said"),
    [
        ("sources", ["--rows", "quick"], "there is no row 'quick'"),
        ("sources", ["--models", "a,b", "--classes", "3"], "2 --models need as many"),
        ("sources", ["--precision", "fp8"], "invalid choice"),
        ("step", ["--rows", "quick"], "there is no row 'quick'"),
        ("step", ["--images", "3"], "fewer --images than --batch"),
        ("step", ["--bach", "3"], "what is --bach 3"),
    ],
)
def test_mistakes(suite, given, said):
    from importlib import import_module

    with pytest.raises(ValueError, match=said):
        import_module(f"fasttrain.benchmarks.{suite}").run(given)
