"""Damaged data sets of few files: CIFAR's pickles, STL-10's arrays, Fashion-MNIST's idx files, packed or not."""

import gzip

import pytest

from .damaged import DamagedFiles, faults, told
from .sets import opened, tiny


@pytest.mark.parametrize(
    ("name", "count"), [("cifar10", 60), ("cifar100", 30), ("stl10", 40), ("fashion_mnist", 60), ("idx", 40)]
)
def test_every_damage_is_refused_or_harmless(name, count, tmp_path):
    root = tiny("fashion_mnist" if name == "idx" else name, tmp_path / "set", samples=2)
    if name == "idx":
        for path in sorted(root.rglob("*.gz")):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    files = sorted(p for p in root.rglob("*") if p.is_file())
    kind = "fashion_mnist" if name == "idx" else name
    damage = DamagedFiles(files, opened(kind, root))
    outcomes = damage.watch(count, str(root))
    print(name, told(outcomes))
    assert not faults(outcomes) and any(o.kind == "refused" for o in outcomes)
