"""One sentence on what holds a training up, and what to try."""

from .recipe import Recipe

_WORTH = 10.0  # percent of the time below which waiting is not worth a word


def advise(share: dict[str, float], recipe: Recipe, loader: str, *, recalled: bool, compiled: bool) -> str:
    """Names the part that holds the target up most, and what to do about it; empty where nothing does.

    Args:
        share: of the time, in percent: ``data``, ``sources``, ``target``, ``processes``, ``optimiser``, ``other``.
        recipe: that runs.
        loader: its name.
        recalled: whether soft labels are recalled.
        compiled: whether the step is.
    """
    data, sources, others = (share.get(part, 0.0) for part in ("data", "sources", "processes"))
    if others >= max(data, sources, _WORTH):
        return (
            f"waits {others:.0f} % for the other processes: try a larger data.batch; the slowest of them sets the pace"
        )
    if max(data, sources) < _WORTH:
        if share.get("optimiser", 0.0) + share.get("other", 0.0) > 4 * _WORTH and not compiled:
            return "the steps are small: try a larger data.batch, or run.compile graphs on a GPU"
        return ""
    if data >= sources:
        return f"waits {data:.0f} % for data: {_for_data(recipe, loader)}"
    return f"waits {sources:.0f} % for sources: {_for_sources(recipe, recalled, compiled)}"


def _for_data(recipe: Recipe, loader: str) -> str:
    workers = "more data.workers" if recipe.data.workers >= 0 else "more CPU cores"
    smaller = "`fasttrain pack --max-size`, a little above data.size"
    if loader == "video":
        smaller = "`fasttrain pack --short-side`, a little above data.size"
        return (
            f"try {smaller if recipe.data.name == 'beton' else '`fasttrain pack` and --data.name beton'}, or {workers}"
        )
    if loader == "torch":
        return "try `fasttrain pack` and --data.name beton, which loads several times as fast"
    if loader == "ffcv":
        return f"try {smaller}, or {workers}"
    if loader == "dali":
        return f"try another data.hw_decoder_load than {recipe.data.hw_decoder_load:g}, or {smaller}"
    return "the step is small beside cutting the views; try a larger data.batch"


def _for_sources(recipe: Recipe, recalled: bool, compiled: bool) -> str:
    if recalled:
        return "they are being met for the first time, or read from their file: see `fasttrain cache` and transfer.recall_gib"
    if any(s.batch_norm == "batch" for s in recipe.chosen_sources()):
        return "batch_norm: batch cannot be recalled; eval can"
    if not recipe.transfer.recall:
        return "try transfer.recall true"
    if not recipe.data.views:
        few = recipe.data.crop in ("pad", "centre") and not recipe.data.frames
        return "try data.views 4, which computes each soft label once" + (", or transfer.every_view" if few else "")
    return "try run.compile true" if not compiled else "try a smaller source size"
