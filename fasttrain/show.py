"""What a person sees on the terminal: a bar for each running run, a line for each finished one, a table at the end."""

import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from .gpu_use import in_short
from .recipe import Recipe
from .sources.recall import Fill
from .words import own_columns, percent, rows_by_kind


class Watch:
    """Shows the lines of runs as they come; on a terminal as bars, elsewhere as plain lines at most every 15 seconds.

    Args:
        recipe: for what is learned from.
        console: where to.
        runs: how many there are.
    """

    def __init__(self, recipe: Recipe, console: Console, runs: int) -> None:
        self.console, self.runs, self.unit = console, runs, recipe.unit()
        self.start, self.done = time.monotonic(), 0
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=console,
        )
        self.tasks: dict[str, Any] = {}
        self.began: dict[str, tuple[float, int]] = {}
        self.val: dict[str, str] = {}
        self.notes: set[str] = set()
        self.advice: dict[str, str] = {}
        self.printed = 0.0

    def __enter__(self) -> "Watch":
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        self.bars.stop()

    def __call__(self, label: str, line: dict[str, Any]) -> None:
        tell = getattr(self, f"_{line['kind']}", None)
        if tell is not None:  # of a step that was left out there is a note, too
            tell(label, line)

    def _note(self, label: str, line: dict[str, Any]) -> None:
        text = line["text"]
        own = text.startswith("going on")
        if own or text not in self.notes:  # what all runs have in common is said once
            self.notes.add(text)
            self._print(f"{label}: {text}" if own and self.runs > 1 else text)

    def _eval(self, label: str, line: dict[str, Any]) -> None:
        name = line["metric"]
        self.val[label] = f"val {name.replace('_', ' ')} {line[name]:.1f} %"

    def _step(self, label: str, line: dict[str, Any]) -> None:
        now, step = time.monotonic(), line["step"]
        first_time, first_step = self.began.setdefault(label, (now, step))
        left = (now - first_time) / (step - first_step) * (line["steps"] - step) if step > first_step else None
        waits = f"waits {line.get('data_share', 0):.0f} % for data, {line.get('sources_share', 0):.0f} % for sources"
        loss = f", loss {line['loss']:.3f}" if "loss" in line else ""
        text = f"{line['images_per_s']:.0f} {self.unit}/s{loss}, {waits}"
        text += f", {use}" if (use := in_short(line)) else ""
        text += f", {self.val[label]}" if label in self.val else ""
        text += f", {_time(left)} left" if left is not None else ""
        advice = line.get("advice", "")
        about = advice.partition(":")[2]
        if about and first_step != step and self.advice.get(label) != about:  # the first steps are not like the others
            self.advice[label] = about
            self._print(f"{label}: {advice}")
        if self.console.is_terminal:
            if label not in self.tasks:
                self.tasks[label] = self.bars.add_task(label, total=1.0, text="")
            self.bars.update(self.tasks[label], completed=step / line["steps"], text=text)
        elif now - self.printed > 15:
            self.printed = now
            self._print(f"{label}: epoch {line['epoch'] + 1} of {line['epochs']}, {text}")

    def _done(self, label: str, line: dict[str, Any]) -> None:
        if label in self.tasks:
            self.bars.remove_task(self.tasks.pop(label))
        self.done += 1
        took = time.monotonic() - self.start
        rest = f", about {_time(took / self.done * (self.runs - self.done))} to go" if self.done < self.runs else ""
        metric, test = line["metric"], line["test"]
        self._print(
            f"{label}: {metric.replace('_', ' ')} {test[metric]:.2f} % on the test split (epoch {line['selected_epoch']}),"
            f" {line['images_per_s']:.0f} {self.unit}/s"
            + (f"; {self.done} of {self.runs} runs done{rest}" if self.runs > 1 else "")
        )

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


class FillBar:
    """Shows how far filling a cache has come: a bar on a terminal, elsewhere a line at most every 15 seconds."""

    def __init__(self, console: Console) -> None:
        self.console, self.printed, self.start = console, time.monotonic(), 0.0
        columns = (TextColumn("soft labels"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
        self.bars = Progress(*columns, console=console, transient=True)
        self.task: Any = None

    def __enter__(self) -> "FillBar":
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        self.bars.stop()

    def note(self, text: str) -> None:
        """Says a line; what comes after it is timed anew."""
        self.start = 0.0
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def __call__(self, fill: Fill) -> None:
        now = time.monotonic()
        self.start = self.start or now
        text = f"{fill.done} of {fill.total}"
        if fill.computed and now > self.start:
            speed = fill.computed / (now - self.start)
            text += f", {speed:.0f} a second, {_time((fill.total - fill.done) / speed)} left"
        if self.console.is_terminal:
            self.task = self.bars.add_task("", total=1.0, text="") if self.task is None else self.task
            self.bars.update(self.task, completed=fill.done / fill.total, text=text)
        elif now - self.printed > 15:
            self.printed = now
            self.console.print(f"soft labels: {text}", highlight=False, soft_wrap=True, markup=False)


def table(content: dict[str, Any]) -> RenderableType:
    """A comparison's table for the terminal; below it, one for each other kind of question that rows answer."""
    return Group(*(_section(content, kind, rows) for kind, rows in rows_by_kind(content["rows"]).items()))


def _section(content: dict[str, Any], kind: str, rows: list[dict[str, Any]]) -> Table:
    own = own_columns(kind)
    metric = content["metric"] if own is None else rows[0]["metric"]
    seeds = max(r["seeds"] for r in rows)
    runs = f", {content['side_by_side']} runs side by side" if content["side_by_side"] > 1 else ""
    what = f"{content['name']}: " if own is None else f"{content['name']}, {kind}: "
    out = Table(title=f"{what}test split, mean ± standard deviation of {seeds} seed{'s' * (seeds > 1)}{runs}")
    found = dict.fromkeys(k for row in rows for k in row["test"])  # rows of clips have more than those of images
    others = [k for k in found if k not in (metric, "loss")]
    count, chance = own or ("", "")
    out.add_column("")
    for name in (count, f"{metric.replace('_', ' ')} %", chance, *(f"{o.replace('_', ' ')} %" for o in others)):
        if name:
            out.add_column(name, justify="right")
    out.add_column(f"{content['unit']}/s", justify="right")
    for row in rows:
        cells = [plus_minus(row["test"][k]) if k in row["test"] else "" for k in (metric, *others)]
        if own is not None:
            cells = [str(row["classes"]), cells[0], percent(row["chance"]), *cells[1:]]
        out.add_row(row["name"], *cells, f"{row['images_per_s']:.0f}")
    return out


def plus_minus(figure: dict[str, Any]) -> str:
    """``mean ± std``, or the mean where there is one seed."""
    return f"{figure['mean']:.2f}" + (f" ± {figure['std']:.2f}" if figure["std"] is not None else "")


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
