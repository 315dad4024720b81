"""The harness of the tests of damage: each fault is noticed for what it is, and damage is a function of its seed."""

import ctypes
import faulthandler
import os
import time

import numpy as np
import pytest
from fasttrain.loaders.beton import read_beton

from .damaged import SPARE, DamagedFiles, damaged, digest, faults, told, watch

_HELD: list[np.ndarray] = []


def badly(what: str):
    """A reader of which case 2 goes wrong."""

    def read(case: int) -> object:
        if case != 2:
            return "right"
        if what == "crashed":
            faulthandler.disable()
            ctypes.string_at(8)
        elif what == "ended":
            os._exit(3)
        elif what == "hung":
            time.sleep(60)
        elif what == "late":
            time.sleep(0.6)
        elif what == "memory":
            _HELD.append(np.ones(SPARE + (8 << 20), dtype=np.uint8))
        elif what == "freed":
            np.ones(SPARE + (8 << 20), dtype=np.uint8)
        elif what == "raised":
            raise KeyError("x.bin")
        elif what == "unclear":
            raise ValueError("cannot read it")
        elif what == "lines":
            raise ValueError("cannot read x.bin\nat all")
        elif what == "unsound":
            raise AssertionError("a label of no class")
        elif what == "refused":
            raise ValueError("cannot read x.bin: it is cut off")
        return what

    return read


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        *((w, w) for w in ("crashed", "hung", "memory", "raised", "unclear", "unsound", "refused", "other")),
        *(("ended", "crashed"), ("late", "hung"), ("freed", "memory"), ("lines", "unclear")),
    ],
)
def test_every_fault_is_noticed_and_the_cases_behind_it_are_run(what, kind):
    outcomes = watch(badly(what), range(5), size=100, names=("x.bin",), seconds=0.5)
    assert [o.kind for o in sorted(outcomes, key=lambda o: o.case)] == ["same", "same", kind, "same", "same"]
    assert len(faults(outcomes)) == (kind not in ("refused", "other"))
    assert told(outcomes) == ", ".join(sorted(["4 same", f"1 {kind}"], key=lambda t: t[2:]))


def test_damage_depends_on_its_seed_alone_and_changes_nearly_everything():
    content = bytes(range(256)) * 20
    made = [damaged(content, seed) for seed in range(240)]
    assert made == [damaged(content, seed) for seed in range(240)]
    assert sum(m != content for m in made) > 200 and len(set(made)) > 200
    assert {len(m) == len(content) for m in made} == {True, False}
    assert all(damaged(b"", seed) and damaged(b"7", seed) is not None for seed in range(24))


def test_damaged_files_are_whole_again(tmp_path):
    paths = [tmp_path / "a.beton", tmp_path / "b"]
    for path in paths:
        path.write_bytes(os.urandom(5000))
    before = [p.read_bytes() for p in paths]

    def read() -> str:
        with pytest.raises(ValueError):
            read_beton(paths[0])
        return "noise"

    outcomes = DamagedFiles(paths, read).watch(20)
    assert told(outcomes) == "20 same" and [p.read_bytes() for p in paths] == before


def test_a_digest_tells_values_apart():
    values = [1, "1", [1], (1,), [[1]], {"a": 1}, np.ones(1), np.ones((1, 1)), np.ones(1, dtype=np.float32), None]
    assert len({digest(value) for value in values}) == len(values)
