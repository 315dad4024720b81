"""Every variant of every kernel, compiled ahead of time: no register may spill, and many blocks must fit on a processor.

A process of its own for each architecture, without Triton's interpreter. First time 45 s each; Triton keeps what it compiled.
"""

import json
import os
import subprocess
import sys

import pytest

# of a streaming multiprocessor: registers, threads, and bytes of shared memory (CUDA C programming guide, sm_80 .. sm_100)
REGISTERS, THREADS, SHARED = 65536, 2048, 163 * 1024


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_no_spills_and_good_occupancy(architecture, need):
    need("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fasttrain.kernels.resources", f"sm_{architecture}", "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert len(rows) >= 60
    names = " ".join(row["name"] for row in rows)
    for part in ("logits", "probabilities", "top-k", "fp32", "bf16", "1000+365", "21841", "backward", "kd", "pixels"):
        assert part in names
    assert [row for row in rows if row["spilled"]] == []
    for row in rows:
        threads = 32 * row["warps"]
        blocks = min(REGISTERS // (row["registers"] * threads), SHARED // max(row["shared"], 1), THREADS // threads)
        # a quarter of the threads hides the latency of memory, where each has several loads under way
        least = THREADS // (2 if "logits" in row["name"] and "1000+365" in row["name"] else 4)
        assert blocks * threads >= least, row
        assert row["registers"] <= 128 and row["shared"] <= 2048, row
        if "1000+365" in row["name"] or "4096" in row["name"]:
            # one element at a time (numbers have 4 bytes) where the compiler knows nothing of where rows begin
            assert row["load_bytes"] == (16 if "in groups" in row["name"] else 4), row
