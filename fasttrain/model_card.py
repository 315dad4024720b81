"""The model card of an exported target: Markdown with the front matter that Hugging Face's hub reads."""

from pathlib import Path
from typing import Any

import yaml

from .recipe import Recipe
from .words import METHODS, method_settings, place_of

_ONE_CLASS = ("accuracy", "balanced_accuracy")  # what weights are selected by where a sample has one class
_CODE = {
    "safetensors": """\
import torch
from fasttrain.export import load
model = load("{file}")  # a torch.nn.Module; model.target is the network without the normalisation
pixels = torch.randint(0, 256, {shape}).float()  # yours: RGB of 0 to 255
print([model.classes[i] for i in model(pixels).argmax(1)])
""",
    "pt2": """\
import json, torch
about = {{"fasttrain.json": ""}}
model = torch.export.load("{file}", extra_files=about).module()
pixels = torch.randint(0, 256, {shape}).float()  # yours: RGB of 0 to 255
print([json.loads(about["fasttrain.json"])["classes"][i] for i in model(pixels).argmax(1)])
""",
    "onnx": """\
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map["fasttrain"])
pixels = numpy.random.randint(0, 256, {shape}).astype("float32")  # yours: RGB of 0 to 255
print([about["classes"][i] for i in session.run(None, {{"pixels": pixels}})[0].argmax(1)])
""",
}


def is_ours(path: Path) -> bool:
    """Whether a file is a model card that may be replaced by another."""
    return path.read_text(errors="replace").startswith("---\nlibrary_name: fasttrain\n")


def text(recipe: Recipe, state: dict[str, Any], summary: dict[str, Any] | None, content: dict[str, Any]) -> str:
    """The card.

    Args:
        recipe: as it was trained.
        state: of the checkpoint.
        summary: the run's ``summary.json``; None leaves the figures on the test split out.
        content: from :func:`fasttrain.export.export`.
    """
    count, sides = len(content["classes"]), ", ".join(map(str, content["input"]))
    sections = [
        _front_matter(recipe, summary),
        f"# {recipe.name}: {content['model']}, {count} classes\n",
        "A network trained by fasttrain, alone: what took part in its training only (auxiliary heads, peers, generators) is "
        "not in these files.\n",
        _table(
            ("network", f"{content['model']}, {content['parameters']:,} parameters"),
            ("classes", f"{count}: {_some(content['classes'])}"),
            ("input", f"pixels [B, {sides}], RGB of 0 to 255, any B: {_input(recipe)}"),
            ("normalisation", f"in the files: mean {_numbers(recipe.data.mean)}, std {_numbers(recipe.data.std)}"),
            ("output", f"logits [B, {count}]{_output(state)}"),
        ),
        "## Use\n",
        *(_use(file, content["input"]) for file in content["files"]),
        "## Training\n",
        _table(*_training(recipe, state, summary)),
        "## Figures\n",
        _figures(recipe, state, summary),
        "## Files\n",
        f"Each was read back and run on a CPU beside the network in the run's checkpoint, on batches of 1 and 3 random samples. "
        f"Logits reached {content['largest_logit']:.3g}.\n",
        _table(
            *((Path(f["path"]).name, f["sha256"], f"{f['largest_difference']:.1e}") for f in content["files"]),
            head=("file", "SHA-256", "largest difference of a logit"),
        ),
        "## Limits\n",
        _limits(recipe, summary),
    ]
    return "\n".join(sections)


def _front_matter(recipe: Recipe, summary: dict[str, Any] | None) -> str:
    task = "video-classification" if recipe.data.frames else "image-classification"
    tags = ["fasttrain", task, recipe.method.name, recipe.target.model.replace(":", "-")]
    front: dict[str, Any] = {"library_name": "fasttrain", "pipeline_tag": task, "tags": tags}
    if summary is not None:
        chosen, selected = summary["metric"], ", weights selected on the test split" if _on_test(recipe) else ""
        test = {chosen: summary["test"][chosen]} | summary["test"]
        metrics = [{"type": k, "name": _figure_name(k) + selected, "value": round(v, 4)} for k, v in test.items()]
        dataset = {"name": recipe.data.name, "type": recipe.data.name, "split": "test"}
        results = [{"task": {"type": task}, "dataset": dataset, "metrics": metrics}]
        front["model-index"] = [{"name": recipe.name, "results": results}]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"


def _input(recipe: Recipe) -> str:
    data = recipe.data
    square = "the middle square" + ("" if data.centre_share == 1 else f", {data.centre_share:g} of the shorter side,")
    shown = f"{square} brought to {data.size} px"
    if data.stored and (data.stored, data.centre_share) != (data.size, 1):
        shown = f"the middle square brought to {data.stored} px, and of that {square} brought to {data.size} px"
    if not data.frames:
        return shown
    apart = "that follow each other" if data.stride == 1 else f"{data.stride} apart"
    places = ", each at three places" if data.crops == 3 else ""
    averaged = f"{data.clips} clips of a video{places}, and the mean of their probabilities"
    return f"{data.frames} frames {apart}, of each {shown}; figures are of {averaged}"


def _output(state: dict[str, Any]) -> str:
    if "metric" not in state:
        return ""
    return (
        "; softmax makes probabilities of them" if state["metric"] in _ONE_CLASS else "; sigmoid, each class by itself"
    )


def _use(file: dict[str, Any], shape: list[int]) -> str:
    name = Path(file["path"]).name
    return f"{name}:\n\n```python\n{_CODE[file['format']].format(file=name, shape=(2, *shape))}```\n"


def _training(recipe: Recipe, state: dict[str, Any], summary: dict[str, Any] | None) -> list[tuple[str, str]]:
    data, optim = recipe.data, recipe.optim
    epoch = state.get("epoch", state.get("position", {}).get("epoch"))
    part = f", split {data.split}" if data.name in ("ucf101", "hmdb51") else ""
    part += f", samples named in {place_of(data.indices)}" if data.indices else ""
    part += f", {data.labelled:,} labelled samples" if data.labelled else ""
    rows = [
        ("method", METHODS[recipe.method.name]),
        *_settings(recipe),
        *_sources(recipe, summary),
        ("data", f"{data.name}{part}; training views: crop {data.crop}, flip {data.flip}"),
        ("started from", _started_from(recipe)),
        (
            "optimiser",
            f"SGD, lr {optim.lr:g} ({optim.schedule}), weight decay {optim.weight_decay:g}, batch {data.batch}",
        ),
        ("epochs", f"{optim.epochs}; these weights are from epoch {epoch}{_averaged(recipe)}"),
        ("selection", _selection(recipe)),
        ("seed", f"{recipe.run.seed} (views: {data.seed})"),
    ]
    if summary is None:
        return rows
    machine, versions = summary["environment"]["machine"], summary["environment"]["versions"]
    where = (
        f"{machine['cpu']}, {machine['cores']} threads, {', '.join(machine['gpu']) or 'no GPU'}, {machine['system']}"
    )
    rows += [("speed", f"{summary['images_per_s']:.1f} {recipe.unit()}/s"), ("machine", where)]
    rows += [("versions", ", ".join(f"{k} {v}" for k, v in versions.items()))]
    return [*rows, ("commit of fasttrain", summary["environment"]["commit"] or "not known")]


def _settings(recipe: Recipe) -> list[tuple[str, str]]:
    """Of the method: what its own fields say."""
    said = method_settings(recipe)
    rows = [("settings", said)] if said else []
    return [*rows, ("soft labels", _soft_labels(recipe))] if recipe.chosen_sources() else rows


def _soft_labels(recipe: Recipe) -> str:
    transfer, data = recipe.transfer, recipe.data
    shown = f"the same view cut from the original at {transfer.still} px" if transfer.still else "what the target sees"
    kept = f", the {transfer.recall_top} largest of each kept" if transfer.recall_top else ""
    views = f"; {data.views} views of each sample" if data.views else ""
    return f"of {shown}{kept}{views}"


def _sources(recipe: Recipe, summary: dict[str, Any] | None) -> list[tuple[str, str]]:
    known = summary["sources"] if summary is not None else {}
    rows = []
    for source in recipe.chosen_sources():
        sha256 = known.get(source.name, {}).get("sha256") or source.sha256 or "not known"
        rows.append(
            (
                f"source {source.name}",
                f"{source.model}, weights {place_of(source.weights)}, {source.classes} classes, {source.size} px; "
                f"SHA-256 of its weights {sha256}",
            )
        )
    return rows


def _started_from(recipe: Recipe) -> str:
    if recipe.target.weights is None:
        return "random weights"
    pinned = f", SHA-256 {recipe.target.sha256}" if recipe.target.sha256 else ""
    return f"{place_of(recipe.target.weights)}{pinned}"


def _averaged(recipe: Recipe) -> str:
    return f" (moving average, decay {recipe.optim.ema:g})" if recipe.optim.ema else ""


def _selection(recipe: Recipe) -> str:
    if _on_test(recipe):
        return "the epoch that was best on the test split itself (protocol: paper)"
    best = "the epoch that was best on the validation split"
    how = best if recipe.run.select == "best" else "the last epoch, whatever its figures"
    return how if recipe.run.protocol == "paper" else f"{how}; the test split is looked at once, at the end"


def _on_test(recipe: Recipe) -> bool:
    """Whether weights were selected on the test split."""
    return recipe.run.protocol == "paper" and recipe.run.select == "best"


def _figures(recipe: Recipe, state: dict[str, Any], summary: dict[str, Any] | None) -> str:
    val, test = state.get("val", {}), summary["test"] if summary is not None else {}
    if not val and not test:
        return "Not known: this is a checkpoint from within a run; `fasttrain eval` measures it.\n"
    rows = [(_figure_name(k), *(_figure(k, split) for split in (val, test))) for k in val | test]
    first = "test, while training" if recipe.run.protocol == "paper" else "validation"
    chosen = f"Weights were selected by {state['metric'].replace('_', ' ')}." if recipe.run.select == "best" else ""
    note = (
        ""
        if summary is not None
        else "The run was not over when this was written, so the test split was not looked at yet."
    )
    return "\n\n".join(s for s in (_table(*rows, head=("", first, "test")).rstrip(), chosen, note) if s) + "\n"


def _limits(recipe: Recipe, summary: dict[str, Any] | None) -> str:
    lines = [
        "No licence is stated. The terms of the data, and of the weights of whatever taught this network, may bind it: they are "
        "yours to check before you pass it on.",
        f"It knows the classes above only, whatever it is shown. Figures hold for samples like those of "
        f"{recipe.data.name}, prepared as above; nothing else was measured.",
        "They are of one run with one seed: other seeds give other figures.",
    ]
    if _on_test(recipe):
        lines.append("Weights were selected on the test split, so its figures are too good by what selecting gains.")
    if summary is not None and sum(summary["bad_samples"].values()):
        lines.append(f"{sum(summary['bad_samples'].values())} samples could not be read and were replaced by others.")
    return "".join(f"- {line}\n" for line in lines)


def _figure_name(name: str) -> str:
    return name.replace("_", " ") + ("" if name == "loss" else ", %")


def _figure(name: str, figures: dict[str, float]) -> str:
    return f"{figures[name]:.{4 if name == 'loss' else 2}f}" if name in figures else ""


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", .. (all of them are in the files)" if len(names) > 12 else "")


def _table(*rows: tuple[str, ...], head: tuple[str, ...] = ("", "")) -> str:
    cells = [head, ("---",) * len(head), *(tuple(" ".join(c.split()).replace("|", "\\|") for c in row) for row in rows)]
    return "".join("| " + " | ".join(row) + " |\n" for row in cells)
