"""Plans for a GPU that is lent for minutes: tests and benchmarks in turn, each within a limit, results as JSON.

    make gpu [PLAN=check|loaders|tune|long] [DATA=FILE.beton] [VIDEO=FILE.beton] [OUT=build/gpu] [GPU_ARGS=..]
    python scripts/gpu.py PLAN [--data FILE.beton] [--video FILE.beton] [--out FOLDER] [--seconds 540] [--only NAME,NAME]
                          [--rehearse] [--list]

  check     GPU tests, sanitizer, kernels, sources, transfer modules, the step: under 9 minutes
  loaders   images and clips from files, and end to end
  tune      single changes of the step and of the kernels' tiles, beside what was predicted
  long      a training of minutes, live and recalled

A step that fails or runs over its limit does not stop those after it; one whose limit is over what is left of --seconds is not
begun. The folder gets each step's JSON and log, and plan.json: exit codes and seconds. The exit code is 1 if any failed.
--rehearse takes each step in small on whatever machine this is, to see that every command is understood before a GPU is
asked for.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN, TREE = (
    ROOT / "build/run",
    ROOT / "build/tree",
)  # made by scripts/tree.sh; from ROOT Python would find the wrong folder


@dataclass(frozen=True)
class Step:
    """One command of a plan.

    Attributes:
        name: of its files.
        words: after ``python -m``; ``{out}``, ``{data}`` and ``{video}`` stand for paths.
        seconds: that it may take at most.
        small: what replaces ``words`` in a rehearsal.
        before: words before ``python``.
    """

    name: str
    words: str
    seconds: int
    small: str
    before: str = ""

    @property
    def needs(self) -> set[str]:
        """What has to be given for it: ``data``, ``video``."""
        return {name for name in ("data", "video") if "{" + name + "}" in self.words}


def _bench(name: str, options: str, seconds: int, small: str) -> Step:
    """A suite with its JSON beside its log."""
    suite = f"fasttrain bench {options}"
    return Step(
        name, f"{suite} --json {{out}}/{name}.json", seconds, f"fasttrain bench {small} --json {{out}}/{name}.json"
    )


_SANITIZE = "tests.gpu.sanitize"
_TWO = "--models timm:test_resnet,timm:test_resnet"  # two networks that are small
PLANS: dict[str, tuple[Step, ...]] = {}


def main(arguments: list[str]) -> int:
    """Runs a plan; 0 only if every step ran and was well."""
    given = _parsed(arguments)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = [s for s in PLANS[given.plan] if not given.only or s.name in given.only]
    if given.list:
        for step in steps:
            print(
                f"{step.name:24} {step.seconds:4} s  {step.before} python -m {step.words}".replace(
                    "  python", " python"
                )
            )
        return 0
    paths = {"out": str(out), "data": _path(given.data), "video": _path(given.video)}
    done, begun = [], time.monotonic()
    for step in steps:
        left = given.seconds - (time.monotonic() - begun)
        lacking = [] if given.rehearse else sorted(n for n in step.needs if not paths[n])
        if lacking or step.seconds > left:
            why = (
                f"--{lacking[0]} is not given"
                if lacking
                else f"{left:.0f} s are left of {given.seconds}, and it may take {step.seconds}"
            )
            done.append({"name": step.name, "not_run": why})
        else:
            done.append(_taken(step, paths, out, given.rehearse))
        print(_line(done[-1]), flush=True)
        (out / "plan.json").write_text(
            json.dumps({"plan": given.plan, "rehearsed": given.rehearse, "steps": done}, indent=2)
        )
    return int(any(one.get("exit_code", 1) != 0 for one in done))


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu.py", usage=__doc__)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--video", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--seconds", type=int, default=540)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.only if name not in {s.name for s in PLANS[given.plan]}]
    if unknown:
        parser.error(f"--only: the plan {given.plan} has no step {unknown[0]!r}")
    return given


def _path(file: Path | None) -> str:
    return str(file.expanduser().resolve()) if file else ""


def command(step: Step, paths: dict[str, str], rehearse: bool) -> list[str]:
    """What is run for a step."""
    words = (step.small if rehearse else step.words).split()
    before = [] if rehearse else step.before.split()
    return [*before, sys.executable, "-m", *(word.format(**paths) for word in words)]


def _taken(step: Step, paths: dict[str, str], out: Path, rehearse: bool) -> dict:
    """Runs a step in a group of processes of its own, so that nothing of it outlives its limit."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    more = os.environ.get("PYTHONPATH")
    environment = kept | {"PYTHONPATH": f"{TREE}:{more}" if more else str(TREE), "PYTHONUNBUFFERED": "1"}
    if not rehearse:
        environment["FASTTRAIN_REQUIRE_GPU"] = "1"
    begun = time.monotonic()
    with open(out / f"{step.name}.log", "w") as log:
        process = subprocess.Popen(
            command(step, paths, rehearse),
            cwd=RUN,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(step.seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise
            code = 124
    return {"name": step.name, "exit_code": code, "seconds": round(time.monotonic() - begun, 1), "limit": step.seconds}


def _line(one: dict) -> str:
    if "not_run" in one:
        return f"{one['name']:24} not run: {one['not_run']}"
    what = {0: "well", 124: "OVER ITS LIMIT"}.get(one["exit_code"], f"FAILED ({one['exit_code']})")
    return f"{one['name']:24} {what}, {one['seconds']:.0f} of {one['limit']} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
