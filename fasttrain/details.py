"""What a run's summary keeps of its answers on the test split besides figures, and what they come to over seeds.

Shape suffixes: K classes; rows of a confusion matrix are labels, columns answers.
"""

from statistics import mean
from typing import Any

import numpy as np

MOST_CLASSES = 100  # of a confusion matrix that is kept whole
MOST_PAIRS = 50


def condensed(details: dict[str, Any]) -> dict[str, Any]:
    """What a task's ``details`` become in summary.json: of over 100 classes no whole confusion matrix, but :func:`confused`."""
    if len(details.get("confusion", ())) <= MOST_CLASSES:
        return details
    return {k: v for k, v in details.items() if k != "confusion"} | confused(details["confusion"])


def confused(confusion_KK: list[list[int]]) -> dict[str, Any]:
    """``confused``: the 50 most frequent errors, each (count, label, answer), and ``class_accuracy``: the share of each class's
    samples that is found, in percent, None without samples."""
    count_KK = np.array(confusion_KK, dtype=np.int64)
    total_K, right_K = count_KK.sum(1), count_KK.diagonal().copy()
    np.fill_diagonal(count_KK, 0)
    most = np.argsort(-count_KK, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = [[int(count_KK.flat[i]), *divmod(int(i), len(count_KK))] for i in most if count_KK.flat[i]]
    share = [100 * r / t if t else None for r, t in zip(right_K.tolist(), total_K.tolist(), strict=True)]
    return {"confused": pairs, "class_accuracy": share}


def over_seeds(details: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts added up (of ``confused``, where an error is not among a seed's 50 it counts as none), shares averaged.

    Args:
        details: of each seed's summary, all of one kind.
    """
    out: dict[str, Any] = {}
    if "confusion" in details[0]:
        out["confusion"] = np.sum([d["confusion"] for d in details], axis=0).tolist()
    if "confused" in details[0]:
        total: dict[tuple[int, int], int] = {}
        for count, label, answer in (pair for d in details for pair in d["confused"]):
            total[label, answer] = total.get((label, answer), 0) + count
        out["confused"] = sorted(([n, *pair] for pair, n in total.items()), key=lambda e: (-e[0], *e[1:]))[:MOST_PAIRS]
    for name in ("class_accuracy", "ap_per_class"):
        if name in details[0]:
            each_K = zip(*(d[name] for d in details), strict=True)
            out[name] = [None if None in of_class else mean(of_class) for of_class in each_K]
    return out


def by_class(details: dict[str, Any]) -> list[float | None]:
    """Percent of each class: average precision, or the share of its samples that is found."""
    if "ap_per_class" in details:
        return details["ap_per_class"]
    return (
        details["class_accuracy"] if "class_accuracy" in details else confused(details["confusion"])["class_accuracy"]
    )


def largest_share(details: dict[str, Any]) -> float | None:
    """The largest class's share of the samples, in percent; None where the details do not say."""
    if "confusion" not in details:
        return None
    total_K = np.array(details["confusion"], dtype=np.int64).sum(1)
    return float(100 * total_K.max() / total_K.sum())
