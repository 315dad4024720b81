"""README's table of speeds: the newest of each suite, GPUs before CPUs, and what is not measured is said."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNMEASURED = "No figure of a GPU exists yet"


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """Writes made-up results, and makes the tables of them."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    performance = importlib.import_module("performance")
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)

    def make(**files: dict) -> str:
        for name, content in files.items():
            (results / f"{name}.json").write_text(json.dumps(content))
        return performance.tables(results)

    return make


def result(suite: str, *rows: dict, gpu: bool = False, **more) -> dict:
    machine = {"cpu": "Some CPU", "cores": 2, "gpu": ["Some GPU"] if gpu else [], "processors": 16}
    return {"suite": suite, "machine": machine, "versions": {"torch": "2.15.0"}, "rows": list(rows), **more}


def step(speed: float, gpu: bool = False, module: bool = False, **more) -> dict:
    row = {"name": "live", "images_per_s": speed, "relative_to": {"paper-style": 4.0}, **more}
    others = {"name": "paper-style", "images_per_s": speed / 4, "relative_to": {}}
    about = {"target": "resnet18", "models": ["torchvision:resnet50"] * 2, "size": 224, "module": module}
    return result("step", others, row, gpu=gpu, **about)


def test_the_newest_of_each_is_shown(tables):
    page = tables(a1=step(100.0), a2=step(250.0), a3=step(80.0, module=True))
    lines = [line for line in page.splitlines() if line.startswith("| training")]
    start = "| training step, sources live: resnet18 with"
    assert lines == [
        f"{start} linear heads at 224 px from 2 x resnet50 | 250 images/s | 4.00 x the paper's way |  |",
        f"{start} transfer modules at 224 px from 2 x resnet50 | 80.0 images/s | 4.00 x the paper's way |  |",
    ]
    assert "Some CPU, 2 cores; torch 2.15.0" in page and "a2.json" in page and "a1.json" not in page
    assert UNMEASURED in page


def test_a_gpu_has_its_own_table_with_floors(tables):
    row = {"name": "fasttrain, B=8192 C=1365", "ms": 0.02, "over_floor": 1.25}
    row["relative_to"] = {"eager, B=8192 C=1365": 4.5, "liger, B=8192 C=1365": 1.4, "reference, B=8192 C=1365": 2.0}
    page = tables(a=step(100.0), b=step(9000.0, gpu=True, over_floor=2.5), c=result("kernels", row, gpu=True))
    assert UNMEASURED not in page and page.index("Some GPU, 16 cores") < page.index("Some CPU")
    assert "| 9,000 images/s | 4.00 x the paper's way | 2.50 |" in page
    assert "| soft-target losses, fasttrain, B=8192 C=1365 | 0.020 ms | 4.50 x eager, 1.40 x Liger | 1.25 |" in page


def test_a_training_from_files_is_beside_its_slower_floor(tables):
    where = {"set": "images", "at": "224 px", "loader": "ffcv"}
    train = {"name": "train, live", "images_per_s": 5000.0, "share": 0.98, "relative_to": {}, **where}
    alone = {"name": "loader alone", "images_per_s": 9000.0, "relative_to": {}, **where}
    page = tables(a=result("end-to-end", train, alone))
    assert "images, 224 px, loader `ffcv`: train, live | 5,000 images/s | 0.98 x the slower of its two floors |" in page
    assert "loader alone" not in page


def test_other_files_are_left_alone(tables):
    assert tables(a={"name": "demo", "rows": []}, b=result("scaling")).strip().startswith(UNMEASURED)
