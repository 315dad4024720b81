"""Shared by all tests: optional parts that may not be skipped in silence, GPU tests, and the command line."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton's kernels then run in its interpreter; it looks at this when imported
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"

from fasttrain import device
from fasttrain.cli import main
from fasttrain.doctor import OPTIONAL, available
from fasttrain.recipe import Recipe, load

settings.register_profile("default", max_examples=60, derandomize=True)  # `--hypothesis-profile long` looks further
settings.register_profile("long", max_examples=1000)
settings.load_profile("default")

REQUIRED = {part for part in os.environ.get("FASTTRAIN_REQUIRE", "").split(",") if part}
if REQUIRED:
    REQUIRED.add("elpv")  # `make test` installs it in every case


def pytest_configure(config):
    unknown = REQUIRED - set(OPTIONAL)
    if unknown:
        raise pytest.UsageError(f"FASTTRAIN_REQUIRE names {sorted(unknown)}; there are {sorted(OPTIONAL)}")


def pytest_collection_modifyitems(items):
    """GPU tests are skipped without a GPU, unless FASTTRAIN_REQUIRE_GPU says that there has to be one."""
    if torch.cuda.is_available() or os.environ.get("FASTTRAIN_REQUIRE_GPU"):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def need():
    """``need("ffcv")`` skips the test if the part is not here, and fails it if FASTTRAIN_REQUIRE names it."""

    def check(part: str) -> None:
        works, note = available(part)
        if not works:
            (pytest.fail if part in REQUIRED else pytest.skip)(f"{part} is not here: {note}")
        if part == "ffcv":  # whatever of it a test uses
            from fasttrain.loaders.ffcv_decoder import leave_numba_types_alone

            leave_numba_types_alone()

    return check


@pytest.fixture(autouse=True)
def _settings():
    """One thread (tests run side by side, and waiting threads would spin), and a random state of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def smoke(tmp_path):
    """The smoke recipe with changes, its runs under the test's own folder."""

    def make(*overrides: str) -> Recipe:
        return load("smoke", ["--run.dir", str(tmp_path / "runs"), "--run.tensorboard", "false", *overrides])

    return make


@pytest.fixture
def fasttrain(tmp_path, monkeypatch):
    """The command line in the test's own folder: ``main`` in this process, which has imported everything already; with
    ``process=True`` or environment variables the real command in a process of its own."""

    def call(*arguments: str, process: bool = False, **environment: str) -> subprocess.CompletedProcess:
        if process or environment:
            return subprocess.run(
                [sys.executable, "-m", "fasttrain", *arguments],
                cwd=tmp_path,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                capture_output=True,
                text=True,
                timeout=240,
            )
        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(tmp_path)
            patch.setattr(device, "keep_memory", lambda: True)  # other tests look at this process's memory
            code = main(list(arguments))
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def repository() -> Path:
    """The source tree."""
    return Path(__file__).parent.parent


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """The folder of clips from UCF101, HMDB51 and Kinetics; fetched where it is not there, with FASTTRAIN_REQUIRE a must."""
    from .loaders.videos import fetch_real_clips

    folder, said = fetch_real_clips()
    if folder is None:
        (pytest.fail if REQUIRED else pytest.skip)(f"scripts/clips.sh: {said}")
    return folder
