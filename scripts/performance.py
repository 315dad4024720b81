"""README's table of speeds, made from the newest file of each suite in benchmarks/results, a table for each kind of machine."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SLOWER = "slower floor"  # of loading and computing, what `bench end-to-end` calls a row's share
UNITS = {"images_per_s": "images/s", "clips_per_s": "clips/s", "ms": "ms"}


@dataclass(frozen=True)
class Shown:
    """Rows of a suite that are shown.

    Attributes:
        suite: its name in the files.
        rows: a pattern of whole names of rows; the rest of a name that is the same for all rows of a shape is kept.
        what: what stands in the table's first column, with ``{size}`` and the like from the row or its file.
        beside: rows of others, as they are named in ``relative_to``, and what they are called in the table.
    """

    suite: str
    rows: str
    what: str
    beside: tuple[tuple[str, str], ...]


SHOWN = (
    Shown(
        "step",
        "live|recalled",
        "training step, sources {name}: {target} with {heads} at {size} px from {models}",
        (("paper-style", "the paper's way"), ("timm-style", "timm's way")),
    ),
    Shown(
        "cifar",
        "ours, .*|step alone",
        "{target} at {size} px, resident, batch {batch}: {name}",
        (("plain eager loop", "a plain eager loop"), ("plain eager loop, compiled", "the same compiled")),
    ),
    Shown(
        "end-to-end",
        "train, .*",
        "from files to updated weights, {set}, {at}, loader `{loader}`: {name}",
        ((SLOWER, "the slower of its two floors"),),
    ),
    Shown(
        "loaders",
        "ffcv|dali gpu.*",
        "loader `{name}`, {size} px",
        (("dataloader (tensor)", "PyTorch's DataLoader"), ("plain ffcv", "plain FFCV")),
    ),
    Shown("video", ".*packed", "clips, {name}", (("best plain", "the best plain decoder"),)),
    Shown(
        "kernels",
        r"(fasttrain|reference|reference compiled), B=(512|8192) C=1365",
        "soft-target losses, {name}",
        (("eager, {shape}", "eager"), ("compiled, {shape}", "torch.compile"), ("liger, {shape}", "Liger")),
    ),
    Shown("sources", "folded|compiled|stacked|graphed", "sources alone, {name}: {models}", (("plain", "plain"),)),
)


def tables(results: Path) -> str:
    """Markdown: a table for the newest GPU, one for the CPU; and what nobody has measured yet."""
    found = {kind: _newest(results, kind) for kind in ("gpu", "cpu")}
    parts = [_table(files, results.parent.parent) for files in found.values() if files]
    if not found["gpu"]:
        parts.append("No figure of a GPU exists yet; `make gpu` measures there, and `make docs` puts them here.")
    return "\n\n".join(parts)


def _newest(results: Path, kind: str) -> dict[tuple, tuple[Path, dict[str, Any]]]:
    """By suite and what it trains: the newest file made on a GPU, or on a CPU."""
    out: dict[tuple, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        suite = content.get("suite")
        has = "gpu" if content.get("machine", {}).get("gpu") else "cpu"
        if has == kind and any(s.suite == suite and _rows(s, content) for s in SHOWN):
            out[suite, *(content.get(k) for k in ("target", "module", "frames"))] = path, content
    return out


def _rows(shown: Shown, content: dict[str, Any]) -> list[dict[str, Any]]:
    """Those to be shown that have something beside them."""
    return [
        row
        for row in content["rows"]
        if re.fullmatch(shown.rows, row["name"]) and any(_ratio(row, name) for name, _ in shown.beside)
    ]


def _table(files: dict[tuple, tuple[Path, dict[str, Any]]], root: Path) -> str:
    lines = ["| | | in the same run | times its floor |", "| --- | --- | --- | --- |"]
    for shown, content in (
        (s, content) for s in SHOWN for (suite, *_), (_, content) in files.items() if suite == s.suite
    ):
        for row in _rows(shown, content):
            unit = next(u for u in UNITS if u in row)
            heads = "transfer modules" if content.get("module") else "linear heads"
            said = {**content, **row, "models": _models(content.get("models", [])), "heads": heads}
            ratios = [f"{ratio:.2f} x {called}" for name, called in shown.beside if (ratio := _ratio(row, name))]
            floor = f"{row['over_floor']:.2f}" if row.get("over_floor") else ""
            figure = f"{_figure(row[unit])} {UNITS[unit]}"
            lines.append(f"| {shown.what.format(**said)} | {figure} | {', '.join(ratios)} | {floor} |")
    newest = max(files.values(), key=lambda its: its[0].name)[1]
    machines = sorted({_machine(content) for _, content in files.values()})
    kept = ", ".join(f"`{path.relative_to(root)}`" for path, _ in files.values())
    return "\n".join(
        [*lines, "", f"{'; '.join(machines)}; torch {newest['versions']['torch']}, medians; kept in {kept}."]
    )


def _ratio(row: dict[str, Any], name: str) -> float | None:
    if name == SLOWER:
        return row.get("share")
    shape = row["name"].partition(", ")[2]
    return row.get("relative_to", {}).get(name.format(shape=shape))


def _figure(value: float) -> str:
    return f"{value:,.3f}" if value < 1 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _models(names: list[str]) -> str:
    short = [name.rpartition(":")[2] for name in names]
    return ", ".join(f"{short.count(n)} x {n}" if short.count(n) > 1 else n for n in dict.fromkeys(short))


def _machine(content: dict[str, Any]) -> str:
    machine = content["machine"]
    if machine["gpu"]:
        return f"{machine['gpu'][0]}, {machine.get('processors', machine['cores'])} cores"
    return f"{machine['cpu']}, {machine['cores']} cores"
