"""Kills a training at random moments, over and over, until it has ended; then compares it with one that nobody disturbed.

    python -m tests.faults.kills [--kills 200] [--ranks 1,2] [--seed 0] [--json FILE] [RECIPE --field value ...]

From the root of the source tree. RECIPE: the demo with one seed and 8 epochs, if none is given. Half of the kills are SIGKILL,
the others ask (SIGTERM, SIGINT, SIGUSR1); of several ranks one or all are hit. After each: no process is left; a run that was
asked has kept every step that it took, and one that was killed goes on from its last checkpoint or a later one. A run that has
ended has the weights of the undisturbed one to the last bit, its figures, and no temporary file. Exit code 0 if all held.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from . import processes

DEMO = ["demo", "--seeds", "1", "--run.parallel", "1", "--optim.epochs", "8", "--run.eval_every", "2"]
DEMO += ["--run.checkpoint_every", "2", "--run.checkpoint_steps", "3", "--run.log_every", "1", "--run.threads", "1"]
DEMO += ["--data.workers", "1"]
_ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def torment(folder: Path, arguments: list[str], *, ranks: int, kills: int, seed: int) -> dict[str, int]:
    """Kills a recipe's runs at least so often, and finishes the last of them; see the module's docstring.

    Args:
        folder: for runs; has to be empty.
        arguments: of ``fasttrain train``, whose runs are under ``runs/``.
        ranks: processes of a run.
        kills: how many that count: of a process that had not ended by itself.
        seed: of the moments.

    Returns:
        Counts: ``killed``, ``asked``, ``runs`` that ended, ``before`` (kills before the first checkpoint).

    Raises:
        AssertionError: something that should hold did not.
    """
    moments = random.Random(seed)
    if ranks > 1:  # one that was killed before all have met
        arguments = [*arguments, "--run.timeout", "15"]
    whole = folder / "undisturbed"
    whole.mkdir()
    began = time.monotonic()
    processes.run(whole, "train", *arguments, ranks=ranks, seconds=600)
    length = time.monotonic() - began
    found = {"killed": 0, "asked": 0, "runs": 0, "before": 0}
    while found["killed"] + found["asked"] < kills:
        place = folder / f"run{found['runs']}"
        place.mkdir()
        while True:
            enough = found["killed"] + found["asked"] >= kills
            run = processes.start(place, "train", *arguments, ranks=ranks)
            if enough:
                assert run.wait(600) == [0] * ranks, run.said()
                break
            known = _steps(place)
            time.sleep(moments.uniform(0, min(0.5 * length, 6.0)))
            asks = moments.random() < 0.5
            number = moments.choice(_ASKS) if asks else signal.SIGKILL
            run.send(number, None if moments.random() < 0.5 else [moments.randrange(ranks)])
            codes = run.wait(120)
            assert run.left() == [], (run.left(), run.said())
            if codes == [0] * ranks:
                break
            _check_stop(place, asks, codes, known, run)
            found["asked" if asks else "killed"] += 1
            found["before"] += not known
        _compare(whole, place)
        found["runs"] += 1
        shutil.rmtree(place)
    return found


def _check_stop(place: Path, asks: bool, codes: list[int], known: dict[str, int], run: processes.Run) -> None:
    """What a stop has left."""
    allowed = {75} if asks else {75, -signal.SIGKILL}
    if asks and "device: " not in run.said():
        allowed |= {-n for n in _ASKS} | {130}  # before it could listen
    assert set(codes) <= allowed, (codes, run.said())
    now = _steps(place)
    for name, step in known.items():
        assert now[name] >= step, (name, step, now[name], run.said())
    if asks and "; the checkpoint of it is in" in run.said():
        for name, step in now.items():
            folder = place / "runs" / name
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert step == max(line["step"] for line in lines), (name, run.said())


def _steps(place: Path) -> dict[str, int]:
    """Runs that have a checkpoint, and the step that the newest whole one is of."""
    from fasttrain import checkpoint

    out = {}
    for folder in sorted((place / "runs").rglob("checkpoints")):
        found = checkpoint.newest(folder, lambda text: None)
        if found is not None:
            out[str(folder.parent.relative_to(place / "runs"))] = found[1]["position"]["step"]
    return out


def _compare(whole: Path, place: Path) -> None:
    paths = sorted(path.relative_to(whole) for path in whole.rglob("*.pt") if path.name in ("last.pt", "selected.pt"))
    assert paths
    for path in paths:
        mine, theirs = (torch.load(folder / path, weights_only=True) for folder in (place, whole))
        assert _same(mine["target"], theirs["target"]), path
        assert _same(mine.get("optimisers"), theirs.get("optimisers")), path
    for path in sorted(path.relative_to(whole) for path in whole.rglob("summary.json")):
        mine, theirs = (json.loads((folder / path).read_text()) for folder in (place, whole))
        assert (mine["test"], mine["val"], mine["steps"]) == (theirs["test"], theirs["val"], theirs["steps"]), path
        curves = [_curve((folder / path).with_name("metrics.jsonl")) for folder in (place, whole)]
        assert curves[0] == curves[1], path
    assert list(place.rglob("*.tmp")) == [] and list(place.rglob("*.partial")) == []
    assert (place / "runs").exists() and list((place / "runs").rglob("table.json"))


def _curve(path: Path) -> list[tuple[Any, ...]]:
    lines = map(json.loads, path.read_text().splitlines())
    return [(line["kind"], line["step"], line.get("loss"), line.get("primary")) for line in lines]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def main() -> int:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--kills", type=int, default=200)
    reader.add_argument("--ranks", default="1,2")
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--json", type=Path)
    asked, arguments = reader.parse_known_args()
    counts = [int(count) for count in asked.ranks.split(",")]
    rows = []
    for ranks in counts:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            each = -(-asked.kills // len(counts))
            found = torment(Path(folder), arguments or DEMO, ranks=ranks, kills=each, seed=asked.seed + ranks)
        rows.append({"ranks": ranks, **found, "seconds": round(time.monotonic() - began)})
        print(json.dumps(rows[-1]), flush=True)
    if asked.json:
        from fasttrain.environment import environment
        from fasttrain.files import write_json

        write_json(asked.json, {"suite": "kills", **environment(), "arguments": arguments or DEMO, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
