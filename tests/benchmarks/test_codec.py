"""The suite that tries DALI's decoder: a process that crashes takes only the way with it at which it was."""

import json
import os
import sys

import numpy as np
import pytest
from fasttrain.benchmarks import codec
from fasttrain.benchmarks.codec import run, tried, ways
from PIL import Image

WAYS = [{"crops": False, "share": s, "fancy": False} for s in (0.0, 0.5, 1.0, 0.25)]
CRASHES = """
import json, os, signal, sys, time
for way in json.loads(sys.argv[1]):
    if way["share"] == 0.5:
        os.kill(os.getpid(), signal.SIGSEGV)
    if way["share"] == 1.0:
        sys.exit("no decoder\\n")
    if way["share"] == 0.25:
        time.sleep(60)
    print(json.dumps({"works": True}), flush=True)
"""


def test_a_crash_is_one_ways(tmp_path):
    (tmp_path / "crashes.py").write_text(CRASHES)
    rows = tried(WAYS, [sys.executable, str(tmp_path / "crashes.py")], dict(os.environ), 0.5)
    assert [row["share"] for row in rows] == [0.0, 0.5, 1.0, 0.25]
    assert rows[0]["works"] and not any(row["works"] for row in rows[1:])
    assert [row["why"] for row in rows[1:]] == [
        "the process ended with SIGSEGV",
        "exit code 1: no decoder",
        "not done after 0 s",
    ]


def test_ways_of_a_gpu():
    found = ways("cuda", [0.0, 1.0])
    assert len(found) == 6 and not any(way["crops"] for way in found[:4]) and all(way["crops"] for way in found[4:])
    assert {(way["share"], way["fancy"]) for way in found[:4]} == {(0.0, False), (0.0, True), (1.0, False), (1.0, True)}


def test_on_this_cpu_both_ways_work(tmp_path, need, monkeypatch, capsys):
    need("dali")
    monkeypatch.setattr(codec.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set/a").mkdir(parents=True)
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((100, 80)).save(tmp_path / f"set/a/{i}.jpg", quality=90)
    content = run(["--data", str(tmp_path / "set"), "--size", "32", "--batch", "2", "--images", "4"])
    assert [row["crops"] for row in content["rows"]] == [False, True] and content["crops_work"]
    for row in content["rows"]:
        assert row["works"] and row["repeats"] and row["mean_difference"] < 0.5 and row["images_per_s"] > 0
    said = capsys.readouterr().out
    assert "whole image: works, " in said and "crop only: works, " in said and json.dumps(content)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--hw", "2"], "shares within 0 and 1"),
        (["--what"], "--what; see"),
        (["--size", "x"], "--size"),
    ],
)
def test_mistakes(given, said):
    with pytest.raises(ValueError, match=said):
        run(given)
