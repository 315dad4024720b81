"""What a figure was made on is told whole, and without the folders of a machine."""

import os
import stat

import pytest

from fasttrain.environment import command, commit, driver, environment, versions


def test_a_command_is_told_without_folders():
    given = ["bench", "step", "--data", "/data/some where/photos.beton", "--json=/tmp/out/x.json", "--size", "96"]
    assert command(given) == "fasttrain bench step --data photos.beton --json=x.json --size 96"
    assert command(["bench", "step", "--rows", "live; recalled"]) == "fasttrain bench step --rows 'live; recalled'"


@pytest.mark.parametrize(
    ("says", "found"), [("echo 580.159.04", "580.159.04"), ("exit 9", "unknown"), ("true", "unknown")]
)
def test_the_driver_is_what_its_tool_says(tmp_path, monkeypatch, says, found):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{says}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert driver() == found


def test_no_tool_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver() == "unknown (FileNotFoundError)"


def test_the_commit_of_copied_files_is_told_from_outside(monkeypatch):
    monkeypatch.setenv("FASTTRAIN_COMMIT", "0123456789ab")
    assert commit() == environment()["commit"] == "0123456789ab"


def test_versions_are_of_what_is_installed():
    assert {"python", "torch", "numpy", "fasttrain"} <= set(versions())
