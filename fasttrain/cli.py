"""The command line: ``fasttrain COMMAND [RECIPE] [--field value ...]``."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

from . import interrupts

TRY_AGAIN = 75  # exit code of a run that was asked to end, or that waited for too long: the same command goes on

USAGE = """\
usage: fasttrain COMMAND ...

  train RECIPE [--field value ...]       train, or go on where it stopped; RECIPE: a packaged
                                         name (demo, smoke, ..) or a YAML file
  describe [RECIPE] [--field value ...]  what would run: parameters, FLOPs, memory, back ends
                                         (--json, --source-classes 1000,365)
  eval RUN [--split test|val] [--field value ...]
                                         figures of a run's folder or checkpoint (--json)
  probe RUN [--split test|val] [--labelled N] [--layers 1,2,0] [--seeds K] [--field value ...]
                                         a linear classifier on the features of every stage of the frozen backbone, beside
                                         random weights (--json)
  export RUN --out FILE|DIR/             the trained target alone: an exported program (.pt2), weights (.safetensors),
                                         ONNX (.onnx), or all of them in a folder, with a model card (--json)
  pack DATASET --root DIR --out FILE     one .beton of images or videos, each of them checked (`fasttrain pack -h`)
  shard FILE.beton --to FOLDER|URL       a packed file in pieces, for storage that many machines read (`fasttrain shard -h`)
  cache RECIPE [--field value ...]       soft labels ahead of a run (`fasttrain cache -h`)
  table N [--rows PATTERN,..] [--data-root DIR] [--budget full|smoke] [--list] [--field value ...]
                                         a table of the paper, 2 to 8 or fig4: ours beside theirs (`fasttrain table -h`)
  pretext RECIPE [--budget full|smoke] [--probe] [--rows] [--field value ...]
                                         puzzle -> clusters -> pseudo-labels -> target (`fasttrain pretext -h`)
  bench loaders|codec|video|kernels|tiles|sources|transfer|step|floors|trace|tuning|cifar|end-to-end|long-run|clusters|
        checkpoints|scaling [--json FILE]
                                             speed beside others' in the same run (`fasttrain bench loaders -h`)
  doctor                                 what this machine has, which back end each part uses, and why (--json)

`fasttrain train --help` explains every field.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0; 2 for a user's mistake (one sentence on stderr); 75 where a training was asked to
    end, or a process or loader did not answer, and the same command goes on; 130 for Ctrl-C elsewhere."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] == "--version":
        try:
            print(metadata.version("fasttrain"))
        except metadata.PackageNotFoundError:  # its files were copied, or are linked
            print("not installed")
        return 0
    command = COMMANDS.get(given[0])
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a process that is gone is told in a sentence, not in stacks
    try:
        if command is None:
            raise ValueError(f"there is no command {given[0]!r}; there are {', '.join(COMMANDS)}")
        if _processes() > 1 and given[0] not in _SEVERAL:
            several = ", ".join(_SEVERAL)
            raise ValueError(
                f"{given[0]} runs in one process, not in {os.environ['WORLD_SIZE']} (WORLD_SIZE); {several} may"
            )
        with interrupts.ends_cleanly() if given[0] == "train" else nullcontext():
            return command(given[1:])
    except interrupts.Preempted as error:
        if _rank() == 0:
            said = str(error) or "asked to end before anything was done"
            print(f"fasttrain: {said}; the same command goes on", file=sys.stderr)
        return TRY_AGAIN
    except KeyboardInterrupt:
        print(f"fasttrain: stopped{_GOES_ON.get(given[0], '')}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("FASTTRAIN_TRACEBACK") or not (isinstance(error, ValueError | OSError) or _again(error)):
            raise
        rank = int(text) if (text := os.environ.get("RANK") or "0").isdecimal() else 0
        who = "" if not rank else f"process {rank}: "
        if type(error).__name__ != "Elsewhere" or not rank:  # the process that met it says it, and the first one
            print(f"fasttrain: error: {who}{' '.join(str(error).split())}", file=sys.stderr)
        return TRY_AGAIN if _again(error) else 2


def _rank() -> int:
    """Of this process, as ``torchrun`` says; 0 of one alone."""
    return int(os.environ.get("RANK") or 0) if _processes() > 1 else 0


def _processes() -> int:
    """Of the run, as ``torchrun`` says.

    Raises:
        ValueError: no number.
    """
    text = os.environ.get("WORLD_SIZE") or "1"
    if not (text.isdecimal() and (os.environ.get("RANK") or "0").isdecimal()):
        raise ValueError(f"WORLD_SIZE and RANK are {text!r} and {os.environ.get('RANK')!r}, not numbers")
    return int(text)


def _again(error: Exception) -> bool:
    """Whether it is nobody's mistake: another process or a loader was late, or has gone."""
    return type(error).__name__ in ("Lost", "Stalled")


def _train(given: list[str]) -> int:
    from . import recipe  # mistakes in a recipe come to light before the slow imports

    if _asks_help(given):
        recipe.parser("fasttrain train RECIPE").print_help()
        return 0
    name, rest = _name(given)
    if name is None:
        raise ValueError("train needs a recipe: a packaged name such as demo, or a YAML file")
    what = recipe.load(name, rest)
    from rich.console import Console

    from . import compare, device, ranks, show

    console = Console()
    with ranks.joined(what.run.timeout, device.choose_device(what.run.device).type == "cuda") as its:
        if not its.first:
            compare.run(what, lambda label, line: None)
            return 0
        with show.Watch(what, console, len(compare.jobs_of(what))) as watch:
            table = compare.run(what, watch)
    console.print(show.table(table))
    folder = os.path.join(what.run.dir, what.name)
    console.print(f"{folder}/report.html, {folder}/table.json", highlight=False, soft_wrap=True)
    return 0


def _describe(given: list[str]) -> int:
    from . import recipe

    if _asks_help(given):
        recipe.parser("fasttrain describe [RECIPE] [--json] [--source-classes N,N]").print_help()
        return 0
    given, as_json = _flag(given, "--json")
    given, classes = _option(given, "--source-classes")
    name, rest = _name(given)
    what, numbers = recipe.load(name, rest), _numbers("--source-classes", classes) if classes else None
    from . import describe

    content = describe.describe(what, numbers)
    print(json.dumps(content, indent=2) if as_json else describe.to_text(content))
    return 0


def _eval(given: list[str]) -> int:
    from . import inference

    given, as_json = _flag(given, "--json")
    given, split = _option(given, "--split")
    name, rest = _name(given)
    if name is None:
        raise ValueError("eval needs a run's folder or a checkpoint")
    content = inference.evaluate_run(name, split or "test", rest)
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        print(f"{content['checkpoint']}, {content['split']} split, {content['images']} images:")
        for key, value in content["figures"].items():
            print(f"  {key.replace('_', ' ')}: {value:.4f}" + ("" if key == "loss" else " %"))
    return 0


def _probe(given: list[str]) -> int:
    given, as_json = _flag(given, "--json")
    options = {}
    for option in ("split", "labelled", "layers", "seeds"):
        given, options[option] = _option(given, f"--{option}")
    name, rest = _name(given)
    if name is None:
        raise ValueError("probe needs a run's folder or a checkpoint")
    labelled, seeds = (_count(f"--{k}", options[k] or default) for k, default in (("labelled", "0"), ("seeds", "1")))
    layers = _numbers("--layers", options["layers"], "1,2,0") if options["layers"] else None
    from rich.console import Console

    from . import probe

    console = Console(stderr=as_json)
    content = probe.probe(
        name,
        rest,
        split=options["split"] or "test",
        labelled=labelled,
        layers=layers,
        seeds=seeds,
        report=lambda line: console.print(line, **_PLAIN),
    )
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        console.print(probe.table(content))
    return 0


def _export(given: list[str]) -> int:
    given, as_json = _flag(given, "--json")
    given, out = _option(given, "--out")
    name, rest = _name(given)
    if name is None or not out:
        raise ValueError("export needs a run's folder or a checkpoint, and --out FILE or --out DIR/")
    if rest:
        raise ValueError(f"what is {rest[0]!r}? export takes a run, --out and --json")
    from . import export

    content = export.export(name, out)
    print(json.dumps(content, indent=2) if as_json else export.to_text(content))
    return 0


def _pack(given: list[str]) -> int:
    from . import packing

    if _asks_help(given):
        print(packing.__doc__)
        return 0
    return packing.main(given)


def _shard(given: list[str]) -> int:
    from . import sharding

    if _asks_help(given):
        print(sharding.__doc__)
        return 0
    return sharding.main(given)


def _cache(given: list[str]) -> int:
    from . import recipe

    if _asks_help(given):
        from . import caching

        print(caching.__doc__)
        return 0
    given, as_json = _flag(given, "--json")
    given, part = _option(given, "--part")
    name, rest = _name(given)
    if name is None:
        raise ValueError("cache needs a recipe: a packaged name such as demo, or a YAML file")
    what, its_part = recipe.load(name, rest), _part(part) if part else (_rank(), _processes())
    from rich.console import Console

    from . import caching, show

    console = Console(stderr=as_json)
    with show.FillBar(console) as bar:
        content = caching.run(what, bar.note, bar, its_part)
    if as_json:
        print(json.dumps(content, indent=2))
    for file in content["files"] if not as_json else ():
        console.print(
            "{path}: {labels} labels, {mib:.1f} MiB on the disk".format(mib=file["bytes"] / 2**20, **file), **_PLAIN
        )
    return 0


def _part(text: str) -> tuple[int, int]:
    """``1/4`` -> (0, 4)."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--part: {text!r} is not a part such as 1/4")
    return int(number) - 1, int(count)


def _table(given: list[str]) -> int:
    from . import tables

    if _asks_help(given):
        print(tables.__doc__)
        return 0
    given, listed = _flag(given, "--list")
    options = {}
    for name in tables.OPTIONS:
        given, options[name] = _option(given, f"--{name}")
    number, overrides = _name(given)
    return tables.main(number, options, listed, overrides)


def _pretext(given: list[str]) -> int:
    from .pretext import steps

    if _asks_help(given):
        print(steps.__doc__)
        return 0
    given, probe = _flag(given, "--probe")
    given, rows = _flag(given, "--rows")
    given, budget = _option(given, "--budget")
    name, rest = _name(given)
    if name is None:
        raise ValueError("pretext needs a recipe: a packaged name such as pretext, or a YAML file")
    return steps.main(name, rest, budget=budget or "full", probe=probe, rows=rows)


def _bench(given: list[str]) -> int:
    suite, rest = _name(given)
    if suite not in SUITES:
        raise ValueError(f"bench needs a suite, not {suite!r}; there are {', '.join(SUITES)}")
    module = importlib.import_module(f"fasttrain.benchmarks.{suite.replace('-', '_')}")
    if _asks_help(rest):
        print(module.__doc__)
        return 0
    rest, file = _option(rest, "--json")
    from . import environment, files

    def save(content: dict[str, Any]) -> None:
        if file:
            said = {"suite": suite, "command": environment.command(["bench", *given])}
            files.write_json(Path(file), said | environment.environment() | content)

    content = module.run(rest, save) if suite in _SAVES else module.run(rest)
    for name, why in content["not_run"].items():
        print(f"not run: {name}: {why}")
    save(content)
    return 0


def _doctor(given: list[str]) -> int:
    from . import doctor

    given, as_json = _flag(given, "--json")
    if given:
        raise ValueError(f"what is {given[0]!r}? doctor takes only --json")
    content = doctor.examine()
    print(json.dumps(content, indent=2) if as_json else doctor.to_text(content))
    return 0


_SEVERAL = ("train", "cache")  # commands that several processes share
_GOES_ON = {
    "train": "; the same command goes on from the last checkpoint",
    "pack": "; the same command goes on where it was",
    "cache": "; the same command goes on where it was",
    "table": "; the same command goes on from the last checkpoint",
    "pretext": "; the same command goes on where it was",
}
SUITES = (
    "checkpoints",
    "cifar",
    "clusters",
    "codec",
    "end-to-end",
    "floors",
    "kernels",
    "loaders",
    "long-run",
    "scaling",
    "sources",
    "step",
    "tiles",
    "trace",
    "transfer",
    "tuning",
    "video",
)
_SAVES = ("long-run",)  # suites that write what they have while they are at work
_PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False}
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "describe": _describe,
    "eval": _eval,
    "probe": _probe,
    "export": _export,
    "pack": _pack,
    "shard": _shard,
    "cache": _cache,
    "table": _table,
    "pretext": _pretext,
    "bench": _bench,
    "doctor": _doctor,
}


def _asks_help(given: list[str]) -> bool:
    return "-h" in given or "--help" in given


def _name(given: list[str]) -> tuple[str | None, list[str]]:
    """The first argument if it is no option, and the rest."""
    return (given[0], given[1:]) if given and not given[0].startswith("-") else (None, given)


def _flag(given: list[str], name: str) -> tuple[list[str], bool]:
    return [g for g in given if g != name], name in given


def _option(given: list[str], name: str) -> tuple[list[str], str | None]:
    for i, argument in enumerate(given):
        if argument.startswith(f"{name}="):
            return given[:i] + given[i + 1 :], argument.partition("=")[2]
        if argument == name:
            if i + 1 == len(given):
                raise ValueError(f"{name} needs a value")
            return given[:i] + given[i + 2 :], given[i + 1]
    return given, None


def _numbers(name: str, text: str, example: str = "1000,365") -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a list of numbers such as {example}") from None


def _count(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name}: {text!r} is not a whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
