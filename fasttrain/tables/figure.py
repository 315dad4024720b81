"""The picture of a table: bars of ours beside the paper's; of Fig. 4 curves over the temperature."""

import io
from typing import Any


def png(content: dict[str, Any]) -> bytes:
    """Draws the rows that have a figure; says so where none has one."""
    from matplotlib.figure import Figure  # slow to import

    drawn = [row for row in content["rows"] if row["ours"] or row["paper"]]
    picture = Figure(
        figsize=(9, 5 if content["table"] == "fig4" else max(2.5, 0.32 * len(drawn) + 1.5)), layout="constrained"
    )
    (_curves if content["table"] == "fig4" else _bars)(picture, drawn)
    picture.suptitle(content["title"])
    out = io.BytesIO()
    picture.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _bars(picture: Any, rows: list[dict[str, Any]]) -> None:
    axes = picture.subplots()
    for k, (name, colour) in enumerate((("ours", "#2a6f97"), ("paper", "#c9cdd2"))):
        at = [i + (k - 0.5) * 0.38 for i, row in enumerate(rows) if row[name]]
        figures = [row[name] for row in rows if row[name]]
        axes.barh(
            at,
            [f["mean"] for f in figures],
            0.38,
            xerr=[f["std"] if f["std"] is not None else float("nan") for f in figures],
            color=colour,
            label=name,
            capsize=2,
        )
    axes.set_yticks(range(len(rows)), [row["id"] for row in rows], fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    least = min([f["mean"] for row in rows for f in (row["ours"], row["paper"]) if f], default=0)
    axes.set_xlim(left=max(0, 5 * ((least - 5) // 5)))  # differences are small beside the accuracies
    axes.set_xlabel("% (the axis does not begin at 0)" if axes.get_xlim()[0] else "%")
    axes.legend(loc="lower right")


def _curves(picture: Any, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(f"{row['data']}/{row['model']}" for row in rows)) or ["nothing was run yet"]
    for axes, name in zip(picture.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        mine = [row for row in rows if f"{row['data']}/{row['model']}" == name]
        for module, style in ((True, "-"), (False, "--")):
            for alpha, colour in ((1.0, "#012a4a"), (0.5, "#2a6f97"), (0.1, "#89c2d9")):
                points = [r for r in mine if (r["module"], r["alpha"]) == (module, alpha) and r["ours"]]
                if points:
                    axes.errorbar(
                        [r["temperature"] for r in points],
                        [r["ours"]["mean"] for r in points],
                        [r["ours"]["std"] if r["ours"]["std"] is not None else float("nan") for r in points],
                        linestyle=style,
                        color=colour,
                        marker="o",
                        markersize=3,
                        label=f"alpha {alpha:g}{', TM' if module else ''}",
                    )
        told = [r for r in mine if r["paper"]]
        axes.plot(
            [r["temperature"] for r in told],
            [r["paper"]["mean"] for r in told],
            "k*",
            markersize=9,
            label="paper (TM, alpha 1)",
        )
        axes.set(title=f"{name}, P+I, CE", xlabel="T", ylabel="%", xticks=[1, 2, 3])
        axes.legend(fontsize=8)
