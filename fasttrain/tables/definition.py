"""The paper's Tables 2 to 8 and Fig. 4, as they are printed, and the experiments that they are rows of.

Columns of Tables 2 to 7: sources, target data, model, method, transfer module (o with, x without), loss, accuracy in percent.
Of Table 8: target data, model, start (s: scratch, f: fine-tuned), KD, DML, SSKT, and the sources of SSKT.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

_PRINTED = {
    "2": """
        -    C10   R20  scratch  -  CE     92.19±0.09
        P    C10   R20  SSKT     o  CE+KD  92.25±0.04
        I    C10   R20  SSKT     o  CE+CE  92.44±0.05
        P+I  C10   R20  SSKT     x  CE+KD  92.46±0.15
        -    C10   R32  scratch  -  CE     93.21±0.09
        P    C10   R32  SSKT     x  CE+KD  92.87±0.31
        I    C10   R32  SSKT     x  CE+CE  93.26±0.08
        P+I  C10   R32  SSKT     o  CE+CE  93.38±0.02
        -    C100  R20  scratch  -  CE     68.26±0.36
        P    C100  R20  SSKT     x  CE+KD  68.01±0.42
        I    C100  R20  SSKT     o  CE+CE  68.63±0.12
        P+I  C100  R20  SSKT     o  CE+CE  68.56±0.23
        -    C100  R32  scratch  -  CE     70.33±0.19
        P    C100  R32  SSKT     x  CE+CE  69.97±0.16
        I    C100  R32  SSKT     o  CE+CE  70.75±0.06
        P+I  C100  R32  SSKT     o  CE+CE  70.94±0.36
        -    S10   R20  scratch  -  CE     81.15±0.34
        P    S10   R20  SSKT     o  CE+CE  82.76±0.05
        I    S10   R20  SSKT     o  CE+CE  83.45±0.07
        P+I  S10   R20  SSKT     o  CE+CE  84.56±0.35
        -    S10   R32  scratch  -  CE     81.19±0.17
        P    S10   R32  SSKT     o  CE+CE  83.06±0.27
        I    S10   R32  SSKT     o  CE+CE  83.68±0.28
        P+I  S10   R32  SSKT     o  CE+CE  83.4±0.2
        -    S10   R44  scratch  -  CE     80.18±0.54
        P    S10   R44  SSKT     o  CE+CE  82.68±0.39
        I    S10   R44  SSKT     o  CE+CE  83.59±0.13
        P+I  S10   R44  SSKT     o  CE+CE  83.44±0.15
    """,
    "3": """
        -    P     R18  scratch  -  CE     50.92
        P    P     R18  SSKT     o  CE+CE  54.5
        I    P     R18  SSKT     o  CE+CE  53.67
        P+I  P     R18  SSKT     x  CE+CE  54.78
        -    I     R18  scratch  -  CE     64.14
        P    I     R18  SSKT     o  CE+CE  64.99
        I    I     R18  SSKT     x  CE+CE  67.79
        P+I  I     R18  SSKT     x  CE+CE  70.57
    """,
    "4": """
        -    VOC   R18  scratch  -  BCE     67.28±0.25
        P    VOC   R18  SSKT     o  BCE+CE  74.76±0.17
        I    VOC   R18  SSKT     x  BCE+CE  74.78±0.09
        P+I  VOC   R18  SSKT     o  BCE+CE  76.42±0.06
        -    VOC   R34  scratch  -  BCE     66.0±0.49
        P    VOC   R34  SSKT     o  BCE+CE  75.65±0.12
        I    VOC   R34  SSKT     o  BCE+CE  75.14±0.14
        P+I  VOC   R34  SSKT     o  BCE+CE  77.02±0.02
        -    VOC   R50  scratch  -  BCE     61.16±0.34
        P    VOC   R50  SSKT     o  BCE+CE  74.44±0.06
        I    VOC   R50  SSKT     o  BCE+CE  74.24±0.05
        P+I  VOC   R50  SSKT     o  BCE+CE  77.1±0.14
    """,
    "5": """
        -    U101  3DR18  scratch  -  CE     43.28
        P    U101  3DR18  SSKT     o  CE+CE  45.35
        I    U101  3DR18  SSKT     x  CE+CE  46.62
        P+I  U101  3DR18  SSKT     x  CE+CE  52.19
        -    H51   3DR18  scratch  -  CE     17.14
        P    H51   3DR18  SSKT     o  CE+CE  18.77
        I    H51   3DR18  SSKT     o  CE+KD  18.77
        P+I  H51   3DR18  SSKT     o  CE+CE  20.54
    """,
    "6": """
        -    S10   R20   scratch  -  CE     81.15±0.34
        -    S10   MV2   scratch  -  CE     72.26±0.83
        -    S10   D121  scratch  -  CE     72.02±0.48
        P+I  S10   R20   SSKT     o  CE+CE  84.56±0.35
        P+I  S10   MV2   SSKT     o  CE+CE  76.96±0.39
        P+I  S10   D121  SSKT     x  CE+CE  77.03±0.17
    """,
    "7": """
        -    VOC   R18    ft(I)  -  CE     90.52±0.11
        P    VOC   R18    SSKT   x  CE+KD  92.28±0.06
        I    VOC   R18    SSKT   x  CE+KD  92.26±0.07
        P+I  VOC   R18    SSKT   o  CE+KD  92.25±0.07
        -    U101  3DR18  ft(K)  -  CE     83.95
        P    U101  3DR18  SSKT   x  CE+KD  84.58
        I    U101  3DR18  SSKT   o  CE+KD  84.37
        P+I  U101  3DR18  SSKT   o  CE+KD  84.19
        -    H51   3DR18  ft(K)  -  CE     56.64
        P    H51   3DR18  SSKT   o  CE+KD  57.82
        I    H51   3DR18  SSKT   o  CE+KD  57.75
        P+I  H51   3DR18  SSKT   o  CE+CE  57.29
    """,
    "8": """
        C10   R20    s  91.75±0.24  92.37±0.15  92.46±0.15  P+I
        C10   R32    s  92.61±0.31  93.26±0.21  93.38±0.02  P+I
        C100  R20    s  68.66±0.24  69.48±0.05  68.63±0.12  I
        C100  R32    s  70.5±0.05   71.9±0.03   70.94±0.36  P+I
        S10   R20    s  77.67±1.41  78.23±1.23  84.56±0.35  P+I
        S10   R32    s  76.07±0.67  77.14±1.64  83.68±0.28  I
        VOC   R18    s  64.11±0.18  39.89±0.07  76.42±0.06  P+I
        VOC   R34    s  64.57±0.12  39.97±0.16  77.02±0.02  P+I
        VOC   R50    s  62.39±0.6   39.65±0.03  77.1±0.14   P+I
        U101  3DR18  s  -           13.8        52.19       P+I
        U101  3DR18  f  -           83.95       84.58       P
        H51   3DR18  s  -           3.01        17.91       P+I
        H51   3DR18  f  -           56.44       57.82       P
    """,
}
TITLES = {
    "2": "Table 2: small images, from scratch and with sources",
    "3": "Table 3: Places365 and ImageNet",
    "4": "Table 4: Pascal VOC, many labels an image",
    "5": "Table 5: videos, from scratch",
    "6": "Table 6: other networks, on STL-10",
    "7": "Table 7: fine-tuned from pretrained weights",
    "8": "Table 8: beside knowledge distillation and deep mutual learning",
    "fig4": "Fig. 4: temperature and weight of the auxiliary losses",
}
_DATA = {"C10": "cifar10", "C100": "cifar100", "S10": "stl10", "P": "places365", "I": "imagenet", "VOC": "voc"}
_DATA |= {"U101": "ucf101", "H51": "hmdb51"}
_MODELS = {f"R{depth}": f"resnet{depth}" for depth in (18, 20, 32, 34, 44, 50)}
_MODELS |= {"3DR18": "resnet3d18", "MV2": "mobilenet_v2", "D121": "densenet121"}
_SWEPT = (("stl10", "resnet20"), ("voc", "resnet18"))  # Fig. 4: data and model, P+I, CE


@dataclass(frozen=True)
class Row:
    """One experiment; the same one in two tables is equal, and is trained once.

    Attributes:
        data: data set, as ``data.name`` calls it.
        model: target, as ``target.model`` calls it.
        method: ``scratch``, ``sskt``, ``kd``, ``dml``, or ``teacher``: what a ``kd`` row learns from, no row of the paper.
        sources: ``P`` (Places365), ``I`` (ImageNet) or ``PI``, of ``sskt``.
        module: with transfer modules.
        loss: the auxiliary one, ``ce`` or ``kd``.
        finetune: starts from pretrained weights.
        temperature, alpha: of the auxiliary losses.
    """

    data: str
    model: str
    method: str
    sources: str = ""
    module: bool = False
    loss: str = "ce"
    finetune: bool = False
    temperature: float = 1.0
    alpha: float = 1.0

    @property
    def id(self) -> str:
        """Its name, and its folder: ``stl10/resnet20/sskt-PI-TM-ce``, ``ucf101/resnet3d18/finetune-dml``."""
        parts = ["finetune"] if self.finetune else []
        if self.method != "scratch" or not parts:
            parts.append(self.method)
        if self.method == "sskt":
            parts += [self.sources, *(["TM"] if self.module else []), self.loss]
        if (self.temperature, self.alpha) != (1, 1):
            parts += [f"T{self.temperature:g}", f"a{self.alpha:g}"]
        return f"{self.data}/{self.model}/{'-'.join(parts)}"

    @property
    def clips(self) -> bool:
        """Whether it learns from videos."""
        return self.data in ("ucf101", "hmdb51")

    @property
    def teacher(self) -> "Row | None":
        """The row whose network teaches this one."""
        return Row(self.data, "resnet50", "teacher") if self.method == "kd" else None


@dataclass(frozen=True)
class Entry:
    """A row in a table, with the accuracy that the paper prints there, in percent; None where it prints none."""

    row: Row
    mean: float | None
    std: float | None


@cache
def table(name: str) -> tuple[Entry, ...]:
    """The entries of a table, in the paper's order.

    Args:
        name: ``2`` to ``8``, or ``fig4``: P+I with cross entropy, T 1 to 3, alpha 1 to 0.1, with and without transfer modules.
            Its values are a plot in the paper; where a point is a row of another table, that one's is taken.
    """
    if name == "fig4":
        return tuple(_sweep())
    lines = [line.split() for line in _PRINTED[name].strip().splitlines()]
    if name == "8":
        return tuple(entry for line in lines for entry in _comparison(*line))
    return tuple(_entry(*line, finetune=name == "7") for line in lines)


def rows(names: list[str]) -> list[Row]:
    """All rows of some tables, each once, with the teachers that they need first."""
    found = dict.fromkeys(entry.row for name in names for entry in table(name))
    return list(dict.fromkeys([*(r.teacher for r in found if r.teacher), *found]))


def _entry(sources: str, data: str, model: str, method: str, module: str, loss: str, figure: str, *, finetune: bool):
    row = Row(_DATA[data], _MODELS[model], "sskt" if method == "SSKT" else "scratch", finetune=finetune)
    if method == "SSKT":
        row = replace(row, sources=sources.replace("+", ""), module=module == "o", loss=loss.rpartition("+")[2].lower())
    return Entry(row, *_figure(figure))


def _comparison(data: str, model: str, start: str, kd: str, dml: str, sskt: str, sources: str) -> Iterator[Entry]:
    """A line of Table 8: its SSKT is the row of Tables 2, 4, 5 and 7 with these sources."""
    base = Row(_DATA[data], _MODELS[model], "", sources=sources.replace("+", ""), finetune=start == "f")
    for method, figure in (("kd", kd), ("dml", dml)):
        if figure != "-":
            yield Entry(replace(base, method=method, sources=""), *_figure(figure))
    same = [e.row for name in ("2", "4", "5", "7") for e in table(name) if e.row.method == "sskt"]
    [found] = [row for row in same if replace(row, method="", module=False, loss="ce") == base]
    yield Entry(found, *_figure(sskt))


def _sweep() -> Iterator[Entry]:
    printed = {e.row: e for name in _PRINTED for e in table(name) if name != "8"}
    for data, model in _SWEPT:
        for module in (True, False):
            for alpha in (1.0, 0.5, 0.1):
                for temperature in (1.0, 2.0, 3.0):
                    row = Row(data, model, "sskt", "PI", module, temperature=temperature, alpha=alpha)
                    yield printed.get(row, Entry(row, None, None))


def _figure(text: str) -> tuple[float, float | None]:
    mean, _, std = text.partition("±")
    return float(mean), float(std) if std else None
