"""Runs a recipe: one run, or a row for each entry of ``rows``, each with every seed; then a table of means."""

import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty
from statistics import mean, median, stdev
from typing import Any

import torch

from . import interrupts, ranks, report
from .build import Parts, build, ground, open_data
from .details import largest_share
from .device import choose_device, own_device, set_up
from .files import write_json
from .log import Watcher
from .pretext.source import CLUSTERS
from .recipe import Recipe, row
from .report_data import first_seeds
from .shortage import explained
from .sources import RecalledSources
from .trained import TRAINED, insist_on_fit
from .trainer import Trainer
from .words import LABELS, learns

_ROW = "row:"
_PATIENCE = 60.0  # seconds for a run side by side to end the step it is at, and to write its checkpoint


@dataclass(frozen=True)
class Job:
    """One run of a row with a seed; ``after`` are the folders of the runs whose weights it starts from or learns from."""

    row: str
    recipe: Recipe
    folder: Path
    after: tuple[Path, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.row}, seed {self.recipe.run.seed}"


def jobs_of(recipe: Recipe) -> list[Job]:
    """All runs that a recipe asks for, seed by seed, so that rows can be compared early."""
    root = Path(recipe.run.dir) / recipe.name
    rows = {name: row(recipe, changes) for name, changes in recipe.rows.items()} or {recipe.name: recipe}
    single = len(rows) == 1 and recipe.run.seeds == 1 and not recipe.rows

    def folder(name: str, seed: int) -> Path:
        place = root / name if recipe.rows else root
        return place if single else place / f"seed{recipe.run.seed if rows[name].run.once else seed}"

    out = []
    for k in range(recipe.run.seeds):
        for name, its in rows.items():
            if k and its.run.once:
                continue
            seed = recipe.run.seed + k
            used = sorted(_rows_used(its, rows, name))
            mine = _with_weights_of(its, {other: str(folder(other, seed)) for other in used})
            mine = replace(mine, run=replace(mine.run, seed=seed))
            out.append(Job(name, mine, folder(name, seed), tuple(folder(other, seed) for other in used)))
    return [job for wave in _waves(out) for job in wave]


def _rows_used(recipe: Recipe, rows: dict[str, Recipe], name: str) -> set[str]:
    """The rows that a row names as ``row:ROW``.

    Raises:
        ValueError: one that is not there, or itself.
    """
    named = [("target.weights", recipe.target.weights or ""), ("data.labels", recipe.data.labels or "")]
    named += [(f"sources: {s.name}: weights", s.weights) for s in recipe.chosen_sources()]
    if recipe.method.name == "dml":
        named += [("method.peer_weights", weights or "") for weights in recipe.method.peer_weights or []]
    used = {}
    for field, weights in named:
        if weights.startswith(_ROW):
            used[weights.removeprefix(_ROW)] = field
    for other, field in used.items():
        if other not in rows or other == name:
            raise ValueError(f"{field}: {_ROW}{other} is no other row of the recipe; there are {', '.join(rows)}")
    return set(used)


def _with_weights_of(recipe: Recipe, folders: dict[str, str]) -> Recipe:
    """The recipe with the folders of runs in the place of ``row:ROW``."""
    if not folders:
        return recipe

    def found(weights: str, place: str = "") -> str:
        folder = folders.get(weights.removeprefix(_ROW)) if weights.startswith(_ROW) else None
        return weights if folder is None else folder + place

    def of_backbone(weights: str | None) -> str | None:
        return None if weights is None else found(weights, "/checkpoints/selected.pt")

    peers, labels = recipe.method.peer_weights, recipe.data.labels
    return replace(
        recipe,
        data=replace(recipe.data, labels=None if labels is None else found(labels)),
        target=replace(recipe.target, weights=of_backbone(recipe.target.weights)),
        sources=[replace(s, weights=found(s.weights)) for s in recipe.sources],
        method=replace(recipe.method, peer_weights=None if peers is None else [of_backbone(w) for w in peers]),
    )


def _waves(jobs: list[Job]) -> list[list[Job]]:
    """The jobs in an order in which none comes before one that it needs: each wave needs only the ones before it.

    Raises:
        ValueError: rows that need each other.
    """
    left, done, out = list(jobs), set[Path](), []
    while left:
        wave = [job for job in left if not set(job.after) & {other.folder for other in left}]
        if not wave:
            raise ValueError(f"rows: {', '.join(sorted({job.row for job in left}))} need each other's weights")
        out.append(wave)
        done |= {job.folder for job in wave}
        left = [job for job in left if job.folder not in done]
    return out


def run(
    recipe: Recipe,
    watch: Callable[[str, dict[str, Any]], None],
    also: Callable[[list[Job]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Trains what is not yet trained, and writes ``table.json`` and ``report.html``.

    Args:
        recipe: with its rows and seeds.
        watch: takes a run's label (empty for all of them) and a line of its log.
        also: does something else with the runs when they are trained, and returns what to add to the table.

    Returns:
        The table: ``{"name", "metric", "rows": [{"method", "sources", "mean", "std", "seeds", "images_per_s", ..}]}``.

    Raises:
        ValueError: a mistake in the recipe, found before anything is written.
    """
    jobs = jobs_of(recipe)
    root = Path(recipe.run.dir) / recipe.name
    its = ranks.here()
    if its.several and recipe.run.parallel > 1:
        raise ValueError(
            f"run.parallel: {recipe.run.parallel} runs side by side, but {its.count} processes train each of them; choose one"
        )
    side_by_side = min(recipe.run.parallel, len(jobs))
    set_up(recipe.run, own_device(recipe.run.device))
    with ExitStack() as stack:
        its.same(lambda: stack.enter_context(locked(root)) if its.first else None)  # and all are here
        summaries = run_jobs(jobs, root / "recall", watch, parallel=side_by_side)

        def finish() -> dict[str, Any]:
            more = also(jobs) if also is not None else {}
            table = tabulate(recipe, jobs, summaries, side_by_side) | more
            write_json(root / "table.json", table)
            report.write(root / "report.html", recipe, table, jobs, summaries)
            return table

        return its.first_does(finish)


def tabulate(recipe: Recipe, jobs: list[Job], summaries: list[dict[str, Any]], side_by_side: int) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) over the seeds, of each row's figures on the test split, in percent.

    Rows may answer different questions (``learns``), each by a ``metric`` of its own; the table's is that of the first row that
    learns the data set's labels. Where the classes are a row's own, ``chance`` is how often an answer is right that does not
    look at the image: 100 / orders, or the share of the largest cluster, None where the summaries do not say.
    """
    rows = []
    for name in recipe.rows or dict.fromkeys(job.row for job in jobs):
        mine = [(j, s) for j, s in zip(jobs, summaries, strict=True) if j.row == name]
        its, metric = mine[0][0].recipe, mine[0][1]["metric"]
        figures = {k: [s["test"][k] for _, s in mine] for k in mine[0][1]["test"]}
        own: dict[str, Any] = {}
        if its.pretext.task != "none":
            own = {"classes": its.pretext.permutations, "chance": 100 / its.pretext.permutations}
        elif its.data.labels is not None:
            shares = [largest_share(s.get("details", {})) for _, s in mine]
            known = [share for share in shares if share is not None]
            own = {"classes": its.pretext.clusters, "chance": mean(known) if len(known) == len(mine) else None}
        rows.append(
            {
                "name": name,
                "learns": learns(its),
                **own,
                "method": its.method.name,
                "sources": [s.name for s in its.chosen_sources()],
                "metric": metric,
                "mean": mean(figures[metric]),
                "std": stdev(figures[metric]) if len(mine) > 1 else None,
                "seeds": len(mine),
                "images_per_s": median(s["images_per_s"] for _, s in mine),
                "train_seconds": median(s["train_seconds"] for _, s in mine),
                "test": {k: {"mean": mean(v), "std": stdev(v) if len(v) > 1 else None} for k, v in figures.items()},
                "val_mean": mean(s["val"][metric] for _, s in mine),
            }
        )
    metric = next((row["metric"] for row in rows if row["learns"] == LABELS), rows[0]["metric"])
    out = {"name": recipe.name, "metric": metric, "unit": recipe.unit(), "side_by_side": side_by_side, "rows": rows}
    return out | {"environment": summaries[0]["environment"]}


def run_jobs(
    jobs: list[Job], recall: Path, watch: Callable[[str, dict[str, Any]], None], *, parallel: int = 1
) -> list[dict[str, Any]]:
    """Trains what is not yet trained.

    Args:
        jobs: from :func:`jobs_of`, or made likewise.
        recall: folder of recalled soft labels.
        watch: takes a run's label and a line of its log.
        parallel: runs side by side, each in a process of its own and, where there are several, on a GPU of its own.

    Returns:
        The summary of each job.

    Raises:
        ValueError: a mistake in a recipe. It is found before anything is written, but for weights that another row has yet to
            train.
    """
    found: dict[Path, dict[str, Any]] = {}
    first = True
    waves = _waves(jobs)
    _check_later(waves)
    its = ranks.here()
    for wave in waves:
        for job in wave:
            its.first_does(partial(make_what_clusters_say, job, lambda text: watch("", {"kind": "note", "text": text})))
        count = min(parallel, len(wave))
        if count > 1:
            summaries = _side_by_side(wave, count, recall, watch)
        else:
            if len(jobs) > 1 and first:  # every row's mistakes come to light before the first is trained
                for job in first_seeds(wave):
                    its.same(partial(_built, job))
            summaries = [_train(job, recall, partial(watch, job.label)) for job in wave]
        first = False
        found |= {job.folder: summary for job, summary in zip(wave, summaries, strict=True)}
    return [found[job.folder] for job in jobs]


def make_what_clusters_say(job: Job, report: Callable[[str], None]) -> None:
    """Pseudo-labels and clusters that a run learns from, by now that the runs which it needs are done."""
    recipe = job.recipe
    wanted = [s for s in recipe.chosen_sources() if s.model == CLUSTERS]
    if recipe.data.labels is None and not wanted:
        return
    from .pretext.labels import make_centroids, make_labels

    if recipe.data.labels is not None:
        make_labels(recipe, report)
    for source in wanted:
        make_centroids(source.weights, recipe, report, f"sources: {source.name}")


def _check_later(waves: list[list[Job]]) -> None:
    """What can be found wrong with runs that need others, before those are trained."""
    by_folder = {job.folder: job for wave in waves for job in wave}
    for job in first_seeds([job for wave in waves[1:] for job in wave]):
        ground(replace(job.recipe, data=replace(job.recipe.data, labels=None)))
        for source in job.recipe.chosen_sources():
            other = by_folder.get(Path(source.weights))
            if source.model == TRAINED and other is not None:
                classes = len(open_data(other.recipe).classes)
                insist_on_fit(source, other.recipe, classes, f"the row {other.row}")


def _train(job: Job, recall: Path, watch: Watcher) -> dict[str, Any]:
    parts = ranks.here().same(lambda: _built(job))
    with explained(job.recipe, parts.device):
        trainer = Trainer(parts, job.folder, recall, watch)
    return trainer.fit()


_LAST: list[Parts] = []


def _built(job: Job) -> Parts:
    """Builds a run, sharing the decoded images of the one built before it in this process."""
    with explained(job.recipe, choose_device(job.recipe.run.device)):
        _LAST[:] = [build(job.recipe)]
    return _LAST[0]


def _side_by_side(jobs: list[Job], count: int, recall: Path, watch) -> list[dict[str, Any]]:
    """Runs in ``count`` processes. Soft targets are computed before, once, with all threads."""
    for job in first_seeds(jobs):
        parts = _built(job)
        if not (job.folder / "summary.json").is_file():
            _fill_ahead(parts, recall, lambda text: watch("", {"kind": "note", "text": text}))
    _LAST.clear()
    context = multiprocessing.get_context("spawn")
    lines: Any = context.Queue()
    devices: Any = context.Queue()
    for i in range(count):
        devices.put(i)
    threads = _shared_out(torch.get_num_threads(), len(jobs), count)
    summaries: dict[int, dict[str, Any]] = {}
    with (
        interrupts.held(),
        ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(lines, devices, os.getpid())) as pool,
    ):
        with _deaf_children():
            work = [pool.submit(_train_in_worker, _with_threads(job, threads[i]), recall) for i, job in enumerate(jobs)]
        futures = {future: i for i, future in enumerate(work)}
        try:
            while len(summaries) < len(jobs):
                _pass_on(lines, watch)
                for future in as_completed([f for f, i in futures.items() if i not in summaries and f.done()]):
                    summaries[futures[future]] = future.result()
            _pass_on(lines, watch)
        except BaseException as error:
            _end(pool)
            if isinstance(error, interrupts.Asked):
                raise interrupts.Preempted("asked to end; the checkpoints of the runs side by side are there") from None
            raise
    return [summaries[i] for i in range(len(jobs))]


def _fill_ahead(parts: Parts, folder: Path, report: Callable[[str], None]) -> None:
    from .caching import fill

    sources = parts.open_sources(folder, report, in_memory=False)
    if isinstance(sources, RecalledSources):
        try:
            fill(parts, sources, report, lambda fill: None)
        except OSError as error:
            report(f"{error}; every run computes them by itself")
        sources.close()


def _end(pool: ProcessPoolExecutor) -> None:
    """Lets the processes end the step they are at; those that take longer are killed."""
    processes, latest = list(pool._processes.values()), time.monotonic() + _PATIENCE
    for process in processes:
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    try:
        for process in processes:
            process.join(max(latest - time.monotonic(), 0))
    finally:  # at once after a second Ctrl-C
        for process in processes:
            process.kill()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started in the block do not hear Ctrl-C, from their first moment on: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shared_out(threads: int, jobs: int, count: int) -> list[int]:
    """Threads of each job: the cores by ``count``; the last ones, too few to fill every process, share all of them."""
    rest = jobs % count
    return [max(1, threads // count)] * (jobs - rest) + [max(1, threads // max(rest, 1))] * rest


def _with_threads(job: Job, threads: int) -> Job:
    return replace(job, recipe=replace(job.recipe, run=replace(job.recipe.run, threads=threads)))


def _pass_on(lines, watch) -> None:
    try:
        while True:
            interrupts.check()
            watch(*lines.get(timeout=0.2))
    except Empty:
        return


_LINES: Any = None
_WORKER = 0  # which of the processes side by side this one is
_ENDS = False  # this process was told to


def _start_worker(lines, devices, parent: int) -> None:
    """Takes the queue for the log's lines; ends this process after its step when told to, at once if its parent dies."""
    import ctypes

    global _LINES, _WORKER
    _LINES, _WORKER = lines, devices.get()
    signal.signal(signal.SIGTERM, partial(_told_to_end, os.getpid()))
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _told_to_end(worker: int, number, frame) -> None:
    if os.getpid() != worker or not interrupts.note():
        os._exit(1)
    _leave()


def _leave() -> None:
    """No further run, and nobody reads the lines any more."""
    global _ENDS
    _ENDS = True
    _LINES.cancel_join_thread()


def _train_in_worker(job: Job, recall: Path) -> dict[str, Any]:
    if _ENDS:  # the pool hands out one job more than there are processes
        raise KeyboardInterrupt
    job = _on_a_device_of_its_own(job, torch.cuda.device_count())
    device = choose_device(job.recipe.run.device)
    set_up(job.recipe.run, device)
    if device.index is not None:
        torch.cuda.set_device(device)
    try:
        return _train(job, recall, lambda line: _LINES.put((job.label, line)))
    except KeyboardInterrupt:
        _leave()
        raise


def _on_a_device_of_its_own(job: Job, gpus: int) -> Job:
    """With several GPUs, and none chosen by the recipe, each process has its own."""
    run = job.recipe.run
    if gpus < 2 or run.device not in ("auto", "cuda"):
        return job
    return replace(job, recipe=replace(job.recipe, run=replace(run, device=f"cuda:{_WORKER % gpus}")))


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keeps a second process out of a run's folder; the lock goes with the process, however it ends."""
    path = root.parent / f".{root.name}.lock"
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise ValueError(f"run.dir: cannot write to {root.parent} ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is training in {root}; choose another --name or --run.dir") from None
        yield
