"""fasttrain cache: computes a recipe's soft labels ahead, so that no run has to.

    fasttrain cache RECIPE [--part I/N] [--json] [--field value ...]

  RECIPE     a packaged name or a YAML file, as for `fasttrain train`; all of its rows
  --part     this process's part of the images, such as 1/4, where several fill one cache together
  --json     print what was done as JSON

The labels lie in transfer.cache, or in runs/NAME/recall, a file for each source; runs of the same sources, images and views
take them from there, whatever their target, optimiser or seed. Size and time are foretold. Stopped at any moment, the same
command goes on where it was.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import compare
from .build import Parts, build, label_bytes
from .device import choose_device, set_up
from .recipe import Recipe
from .report_data import first_seeds
from .sources import RecalledSources
from .sources.recall import Fill

Report = Callable[[str], None]


def folder_of(recipe: Recipe) -> Path:
    """Where a recipe's recalled soft labels are."""
    return Path(recipe.transfer.cache) if recipe.transfer.cache else Path(recipe.run.dir) / recipe.name / "recall"


def fill(
    parts: Parts,
    sources: RecalledSources,
    report: Report,
    progress: Callable[[Fill], None],
    part: tuple[int, int] = (0, 1),
) -> None:
    """Computes what is missing in a run's soft labels.

    Args:
        parts: of the run.
        sources: from ``parts.open_sources``.
        report: takes a line on what is to be done, and on what was.
        progress: hears of every batch.
        part: (i, n): the i-th of n parts of every batch.

    Raises:
        ValueError: the disk has no room for them.
        OSError: it filled up meanwhile.
    """
    each = label_bytes(parts.recipe, 1, parts.source_dtype) // sources.views
    lacking = sum(
        len(np.unique(np.concatenate([f.missing(view, sources.index_N) for f in sources.files])))
        for view in range(sources.views)
    )
    if not lacking:
        return
    names, free = " and ".join(sources.names), shutil.disk_usage(sources.files[0].path.parent).free
    size = f"{_mib(lacking * each)} of {_mib(sources.views * len(sources.index_N) * each)}"
    if lacking * each > free:
        raise ValueError(
            f"transfer.cache: {sources.files[0].path.parent} has room for {_mib(free)}, and the soft labels of {names} "
            f"take {_mib(lacking * each)} more; choose another folder, fewer data.views, or transfer.recall_top"
        )
    report(f"soft labels: {sources.views} views of {len(sources.index_N)} images from {names}; {size} to be computed")
    start = time.perf_counter()
    rank, ranks = part
    spec = replace(parts.source_spec, rank=rank, ranks=ranks, parts=0)
    sources.fill(parts.open_loader, spec, progress)
    took = time.perf_counter() - start
    report(
        f"soft labels: {sources.computed} images in {took:.1f} s ({sources.computed / max(took, 1e-9):.0f} a second)"
    )


def run(
    recipe: Recipe, report: Report, progress: Callable[[Fill], None], part: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """Fills the caches of all rows of a recipe.

    Returns:
        ``{"files": [{"path", "bytes", "labels", "views", "samples"}], "seconds"}``.

    Raises:
        ValueError: nothing of it is recalled, or a mistake in the recipe.
    """
    set_up(recipe.run, choose_device(recipe.run.device))
    start, files = time.perf_counter(), {}
    for job in first_seeds(compare.jobs_of(recipe)):
        if not job.recipe.chosen_sources():
            continue
        if any(not (folder / "summary.json").is_file() for folder in job.after):
            report(f"{job.row}: its soft labels come from a row that is not trained yet")
            continue
        compare.make_what_clusters_say(job, report)
        parts = build(job.recipe)
        sources = parts.open_sources(folder_of(recipe), report, in_memory=False)
        for loader in parts.loaders.values():
            loader.close()
        if not isinstance(sources, RecalledSources):
            continue
        fill(parts, sources, report, progress, part)
        for file in sources.files:
            views, samples = file.shape
            about = {"path": str(file.path), "bytes": file.path.stat().st_blocks * 512, "labels": file.count()}
            files[str(file.path)] = about | {"views": views, "samples": samples}
        sources.close()
    if not files:
        raise ValueError(
            "nothing of this recipe is recalled: it needs sources, transfer.recall, and data.views or transfer.every_view"
        )
    return {"files": list(files.values()), "seconds": time.perf_counter() - start}


def _mib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
