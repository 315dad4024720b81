"""What a table leaves: its content as JSON, CSV, Markdown and a figure, and what the terminal shows."""

import csv
import io
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich import box
from rich.table import Table

from ..files import write_json, write_text, write_whole
from ..show import plus_minus
from .definition import TITLES, Entry, Row

_FIELDS = ("id", "data", "model", "method", "sources", "module", "loss", "temperature", "alpha", "finetune")
_METRICS = {
    "voc": ("sample_ap", "map"),
    "ucf101": ("accuracy", "clip_accuracy"),
    "hmdb51": ("accuracy", "clip_accuracy"),
}
_NAMES = {"sample_ap": "AP per image", "map": "class mAP", "clip_accuracy": "of clips", "accuracy": "accuracy"}
_NOTES = {
    "voc": "Pascal VOC: what the published code calls AP is the average precision over the classes of each image (AP per image), "
    "so that is what stands beside the paper's; class mAP is the usual figure. The paper names no year; years that are there "
    "are joined.",
    "8": "Table 8 prints 17.91 for SSKT on HMDB51 from scratch, and Table 5 20.54 for the same row. The KD teacher, of which the "
    "paper says nothing, is the row */teacher: ImageNet's ResNet-50, fine-tuned.",
    "fig4": "The paper's values are a plot; only the points that are rows of Tables 2 and 4 have a number.",
}
_PROTOCOLS = {
    "validation": "Ours: weights are selected on a validation split, and the test split is looked at once. The paper's: the best "
    "of all combinations of loss, transfer module and sources, by its own account, and its code looks at the test split every "
    "epoch.",
    "paper": "PROTOCOL paper: weights are selected on the test split itself, and nothing is held out: too good a figure, as in "
    "the published code.",
}


def content_of(
    name: str,
    entries: list[Entry],
    found: dict[Row, list[dict[str, Any]]],
    states: dict[Row, str],
    about: dict[str, Any],
) -> dict[str, Any]:
    """A table as JSON can hold it.

    Args:
        name: of the table.
        entries: its rows.
        found: the summaries of each row's finished runs.
        states: of each row, in words; ``done`` where all seeds are.
        about: ``budget``, ``protocol``, ``changes`` (fields that were set for every row) and ``command``.
    """
    smoke = about["budget"] == "smoke"
    notes = ["SMOKE: one epoch of two steps on made-up data: these figures mean nothing."] if smoke else []
    notes.append(_PROTOCOLS[about["protocol"]])
    if about["changes"]:
        notes.append(f"Changed in every row: {', '.join(about['changes'])}.")
    notes += [_NOTES[key] for key in ("voc", name) if key in _NOTES and (key == name or _of_voc(entries))]
    summaries = [s for entry in entries for s in found[entry.row]]
    out: dict[str, Any] = {"table": name, "title": ("SMOKE: " if smoke else "") + TITLES[name]} | about
    out |= {"notes": notes, "rows": [_line(e, found[e.row], states[e.row], smoke) for e in entries]}
    return out | {"environment": summaries[0]["environment"] if summaries else None}


def write(folder: Path, content: dict[str, Any]) -> list[Path]:
    """Writes ``tableN.json``, ``.csv``, ``.md`` and ``.png`` (of a smoke run ``SMOKE-tableN``) and returns their paths."""
    from . import figure

    name = content["table"] if content["table"].startswith("fig") else f"table{content['table']}"
    stem = f"SMOKE-{name}" if content["budget"] == "smoke" else name
    paths = [folder / f"{stem}.{kind}" for kind in ("md", "csv", "json", "png")]
    picture = figure.png(content)
    write_text(paths[0], markdown(content, paths[3].name))
    write_text(paths[1], to_csv(content))
    write_json(paths[2], content)
    write_whole(paths[3], lambda file: file.write(picture))
    return paths


def terminal(content: dict[str, Any], chosen: list[str]) -> Table:
    """The chosen rows (their ids), for the terminal: in 80 columns, so without what is empty, and without the reasons of what
    was not run."""
    out = Table(title=f"{content['title']} (%)", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    lines = [row for row in content["rows"] if row["id"] in chosen]
    head, cells = _cells(content["title"], lines)
    cells = [[*(text.replace(" ± ", "±") for text in line[:-1]), line[-1].partition(":")[0]] for line in cells]
    told = [{line[i] for line in cells} for i in range(len(head))]
    left_out = [(head[i], texts) for i, texts in enumerate(told) if texts == {""} or head[i] == "seeds"]
    left_out.append(("state", {"done"}))
    shown = [i for i in range(len(head)) if (head[i], told[i]) not in left_out]
    for i in shown:
        text = head[i] in ("row", "state")
        out.add_column(head[i], justify="left" if text else "right", no_wrap=head[i] != "row", overflow="fold")
    for line in cells:
        out.add_row(*(line[i] for i in shown))
    return out


def markdown(content: dict[str, Any], picture: str) -> str:
    """The table as a page."""
    head, lines = _cells(content["title"], content["rows"])
    out = [f"# {content['title']}", "", f"![ours beside the paper's]({picture})", ""]
    out += ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    out += ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines] + [""]
    out += [f"- {note}" for note in content["notes"]] + ["", f"`{content['command']}`; {_made_on(content)}", ""]
    return "\n".join(out)


def to_csv(content: dict[str, Any]) -> str:
    """A line a row; figures in percent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    others = list(dict.fromkeys(k for row in content["rows"] for k in row["others"]))
    figures = [f"{k}_{part}" for k in ("ours", "paper") for part in ("mean", "std")]
    writer.writerow(
        [*_FIELDS, "metric", *figures, "difference", *others, "seeds", "images_per_s", "state", "budget", "protocol"]
    )
    for row in content["rows"]:
        pairs = [(row[k] or {}).get(part) for k in ("ours", "paper") for part in ("mean", "std")]
        more = [(row["others"].get(k) or {}).get("mean") for k in others]
        line = [*(row[k] for k in _FIELDS), row["metric"], *pairs, row["difference"], *more, row["seeds"]]
        writer.writerow([*line, row["images_per_s"], row["state"], content["budget"], content["protocol"]])
    return out.getvalue()


def _line(entry: Entry, summaries: list[dict[str, Any]], state: str, smoke: bool) -> dict[str, Any]:
    row = entry.row
    metric, *others = _METRICS.get(row.data, ("accuracy",))
    ours = _figure(metric, summaries)
    paper = None if entry.mean is None else {"mean": entry.mean, "std": entry.std}
    return {
        **{name: getattr(row, name) for name in _FIELDS},
        "metric": metric,
        "ours": ours,
        "paper": paper,
        "difference": ours["mean"] - paper["mean"] if ours and paper and not smoke else None,
        "others": {name: _figure(name, summaries) for name in others},
        "seeds": len(summaries),
        "images_per_s": median(s["images_per_s"] for s in summaries) if summaries else None,
        "state": state,
    }


def _figure(name: str, summaries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Mean and standard deviation (n - 1) on the test split, in percent."""
    values = [s["test"][name] for s in summaries]
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None} if values else None


def _cells(title: str, lines: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and cells, as text."""
    others = list(dict.fromkeys(k for line in lines for k in line["others"]))
    clips = all(line["data"] in ("ucf101", "hmdb51") for line in lines)
    ours = "SMOKE" if title.startswith("SMOKE") else "ours"
    head = [
        "row",
        ours,
        "paper",
        "diff",
        *(_NAMES[k] for k in others),
        "seeds",
        "clips/s" if clips else "images/s",
        "state",
    ]
    out = []
    for line in lines:
        figures = [line["ours"], line["paper"]]
        text = [line["id"], *(plus_minus(f) if f else "" for f in figures)]
        text.append(f"{line['difference']:+.2f}" if line["difference"] is not None else "")
        text += [plus_minus(line["others"][k]) if line["others"].get(k) else "" for k in others]
        text += [str(line["seeds"] or ""), f"{line['images_per_s']:.0f}" if line["images_per_s"] is not None else ""]
        out.append([*text, line["state"]])
    return head, out


def _of_voc(entries: list[Entry]) -> bool:
    return any(entry.row.data == "voc" for entry in entries)


def _made_on(content: dict[str, Any]) -> str:
    made = content["environment"]
    if made is None:
        return "nothing was run yet"
    machine = made["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
    return f"{machine['cpu']}, {', '.join(machine['gpu']) or 'no GPU'}; commit {made['commit']}; {versions}"
