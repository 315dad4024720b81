"""Setting up on machines that lack something: one clear sentence, and what can go on goes on."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("sh", "uname", "mkdir", "dirname", "rm", "tail", "printf", "env", "cat")


@pytest.fixture
def machine(tmp_path):
    """A copy of the script on a machine whose commands are stubs: ``machine(what, name=script, ..)``."""
    shutil.copytree(ROOT / "scripts", tmp_path / "project/scripts")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for tool in TOOLS:
        os.symlink(shutil.which(tool), binaries / tool)

    def run(what: str, venv_python: str | None = None, **stubs: str) -> subprocess.CompletedProcess:
        for name, script in stubs.items():
            path = binaries / {"cplusplus": "c++"}.get(name, name.replace("__", "-"))
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        if venv_python is not None:
            path = tmp_path / "project/.venv/bin/python"
            path.parent.mkdir(parents=True)
            path.write_text(f"#!/bin/sh\n{venv_python}\n")
            path.chmod(0o755)
        command = [str(binaries / "sh"), "scripts/venv.sh", what]
        environment = {"PATH": str(binaries), "HOME": str(tmp_path)}
        return subprocess.run(
            command, cwd=tmp_path / "project", env=environment, capture_output=True, text=True, timeout=60
        )

    return run


def test_no_python(machine):
    out = machine("demo")
    assert out.returncode == 1
    assert out.stderr == (
        "fasttrain: Python 3.11 or newer is needed and none was found; install one, or name it: "
        "PYTHON=/path/to/python3 make demo\n"
    )


def test_only_an_old_python(machine):
    out = machine("demo", python3="exit 1")
    assert out.returncode == 1 and "Python 3.11 or newer is needed" in out.stderr


PYTHON_WITHOUT_VENV = 'case "$*" in *venv*) exit 1;; *"%d.%d"*) echo 3.12;; *) exit 0;; esac'


def test_no_venv_module_and_no_right_to_install(machine, tmp_path):
    out = machine("demo", python3=PYTHON_WITHOUT_VENV, id="echo 1000", apt__get="exit 100")
    assert out.returncode == 1
    assert "may not install packages; ask for: apt-get install python3.12-venv" in out.stderr
    assert not (tmp_path / "project/.venv").exists()


def test_no_venv_module_but_sudo(machine, tmp_path):
    log = tmp_path / "apt.log"
    sudo = '[ "$2" = true ] && exit 0; shift; exec "$@"'
    machine("demo", python3=PYTHON_WITHOUT_VENV, id="echo 1000", sudo=sudo, apt__get=f'echo "$@" >> {log}')
    assert "install -y -qq python3.12-venv" in log.read_text()


FFCV_MISSING = 'case "$*" in *"import ffcv"*) exit 1;; *) exit 0;; esac'


@pytest.mark.parametrize("rights", ["none", "root"])
def test_ffcv_libraries(machine, tmp_path, rights):
    """Without them and without rights FFCV is left out with a sentence; with rights apt is asked for them."""
    log = tmp_path / "apt.log"
    user = "echo 0" if rights == "root" else "echo 1000"
    out = machine("test", FFCV_MISSING, id=user, apt__get=f'echo "$@" >> {log}', pkg__config="exit 1")
    assert out.returncode == 0
    assert "FFCV is left out: it needs apt-get install build-essential pkg-config libopencv-dev" in out.stdout
    assert "everything else works without it" in out.stdout
    assert log.exists() == (rights == "root")


def test_ffcv_is_built_where_its_libraries_are(machine, tmp_path):
    log = tmp_path / "python.log"
    python = f'echo "$@" >> {log}; {FFCV_MISSING}'
    out = machine("test", python, id="echo 1000", pkg__config="exit 0", cplusplus="exit 0")
    assert out.returncode == 0 and "left out" not in out.stdout
    assert any("-e .[ffcv]" in line for line in log.read_text().splitlines())


def test_pip_stands_in_for_uv(machine, tmp_path):
    log = tmp_path / "python.log"
    python = f'echo "$@" >> {log}; case "$*" in "-m uv --version") exit 0;; *"uv pip install"*) exit 1;; esac; exit 0'
    out = machine("demo", python)
    assert out.returncode == 0 and "trying pip" in out.stdout
    assert "-m pip install -q -e .[demo]" in log.read_text().splitlines()


def test_a_failed_installation_stops(machine):
    out = machine("demo", 'case "$*" in *install*) exit 1;; esac; exit 0')
    assert out.returncode == 1 and "the installation failed; see build/pip.log" in out.stderr
