"""The templates of docs/cluster.md: shells and parsers can read them, and they name options and fields that exist."""

import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from fasttrain.recipe import Recipe
from fasttrain.sharding import main


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return (repository / "docs/cluster.md").read_text()


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def checked(script: str) -> None:
    out = subprocess.run([shutil.which("bash") or "bash", "-n"], input=script, capture_output=True, text=True)
    assert out.returncode == 0 and not out.stderr, f"{out.stderr}\n{script}"


def test_shells_can_read_the_scripts(text):
    scripts = blocks(text, "bash")
    assert len(scripts) == 7 and sum("#SBATCH" in script for script in scripts) == 2
    for script in scripts:
        checked(script)
    (inner,) = re.findall(r"bash -c '\n(.*?)^'", text, re.MULTILINE | re.DOTALL)
    checked(inner)


def test_the_job_fits_its_service(text):
    (content,) = blocks(text, "yaml")
    service, job = yaml.safe_load_all(content)
    pod = job["spec"]["template"]["spec"]
    assert service["spec"] | {"clusterIP": "None", "selector": {"job-name": job["metadata"]["name"]}} == service["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] and pod["restartPolicy"] == "Never"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    (container,) = pod["containers"]
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        assert len(rule.keys() & {"onExitCodes", "onPodConditions"}) == 1
        assert rule.get("onExitCodes", {"containerName": container["name"]})["containerName"] == container["name"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    (script,) = container["args"]
    checked(script)
    assert f"--nnodes {job['spec']['completions']} " in script
    wait = int(re.search(r"--shutdown-timeout (\d+)", script)[1])  # type: ignore[index]
    assert wait < pod["terminationGracePeriodSeconds"]


def test_options_and_fields_exist(text):
    groups = {f.name: {g.name for g in fields(f.default_factory)} for f in fields(Recipe) if f.name in ("data", "run")}  # type: ignore[arg-type]
    named = re.findall(r"(?:--|`)(data|run)\.(\w+)", text)
    assert {g for g, _ in named} == set(groups)
    assert all(name in groups[group] for group, name in named)

    with pytest.raises(ValueError, match=r"cannot read .*imagenet\.beton"):
        main(["/nowhere/imagenet.beton", "--to", "memory://bucket/imagenet"])
