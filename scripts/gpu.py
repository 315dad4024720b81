"""Plans for a GPU that is there for minutes: tests and benchmarks in turn, each within a limit, results as JSON.

    make gpu [PLAN=check] [DATA=FOLDER|FILE.beton] [VIDEO=FILE.beton] [OUT=build/gpu] [GPU_ARGS=..]
    python scripts/gpu.py PLAN [--data FOLDER|FILE.beton] [--video FILE.beton] [--out FOLDER] [--seconds 540]
                          [--only NAME,NAME] [--rehearse] [--list]

  PLAN       check: GPU tests, and kernels under a sanitizer; data: the benchmarks' photographs, made in OUT-data of those in
             the folder DATA; kernels, step, module, tune, tune-more: what is computed; loaders, files, video: what is loaded;
             long: a training of minutes. Each is made for 9 minutes (scripts/gpu_plans.py)
  --seconds  that all steps may take together

A step that fails or runs over its limit does not stop those after it; one that should take longer than what is left is not
begun. The folder gets each step's JSON and log, and plan.json: exit codes and seconds. The exit code is 1 if any failed.
--rehearse takes each step in small on whatever machine this is, to see that every command is understood before a GPU is
asked for.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_plans import PLANS, Step

ROOT = Path(__file__).resolve().parent.parent
RUN, TREE = ROOT / "build/run", ROOT / "build/tree"  # `make gpu` makes them; in ROOT Python would find the wrong folder


def main(arguments: list[str]) -> int:
    """Runs a plan; 0 only if every step ran and was well."""
    given = _parsed(arguments)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = [s for s in PLANS[given.plan] if not given.only or s.name in given.only]
    if given.list:
        for step in steps:
            print(f"{step.name:24} {step.seconds:4} s  {step.words}")
        return 0
    paths = {"python": sys.executable, "out": str(out), "data": _path(given.data), "video": _path(given.video)}
    done, begun = [], time.monotonic()
    for step in steps:
        left = given.seconds - (time.monotonic() - begun)
        why = "" if given.rehearse else _why_not(step, paths, left)
        if given.rehearse and not step.small:
            why = "there is nothing to rehearse"
        one = {"name": step.name, "not_run": why} if why else _taken(step, paths, out, left, given.rehearse)
        done.append(one)
        print(_line(one), flush=True)
        content = {"plan": given.plan, "rehearsed": given.rehearse, "steps": done}
        (out / "plan.json").write_text(json.dumps(content, indent=2))
    return int(any(not one["well"] if "well" in one else not given.rehearse for one in done))


def _why_not(step: Step, paths: dict[str, str], left: float) -> str:
    """Why a step is not begun, or nothing."""
    lacking = [name for name in step.needs if not paths[name]]
    if lacking:
        return f"--{lacking[0]} is not given"
    return f"{left:.0f} s are left, and it should take {step.seconds}" if step.seconds > left else ""


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
    return [word.format(**paths) for word in shlex.split(step.small if rehearse else step.words)]


def _taken(step: Step, paths: dict[str, str], out: Path, left: float, rehearse: bool) -> dict:
    """Runs a step in a group of processes of its own, so that nothing of it outlives its limit."""
    more = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": f"{TREE}:{more}" if more else str(TREE), "PYTHONUNBUFFERED": "1"}
    if not rehearse:
        environment["FASTTRAIN_REQUIRE_GPU"] = "1"
    limit = 600.0 if rehearse else min(2.0 * step.seconds, left)
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
            code = process.wait(limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise
            code = 124
    well = code == (0 if rehearse else step.expects)
    seconds = round(time.monotonic() - begun, 1)
    return {"name": step.name, "well": well, "exit_code": code, "seconds": seconds, "limit": round(limit)}


def _line(one: dict) -> str:
    if "not_run" in one:
        return f"{one['name']:24} not run: {one['not_run']}"
    what = "well" if one["well"] else "OVER ITS LIMIT" if one["exit_code"] == 124 else f"FAILED ({one['exit_code']})"
    return f"{one['name']:24} {what}, {one['seconds']:.0f} of {one['limit']} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
