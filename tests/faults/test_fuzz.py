"""Parsers against generated files: each raises a ``ValueError`` that names file and line, or gives what a plain oracle gives."""

import csv
import io
import json
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import numpy as np
import pytest
import yaml
from fasttrain.loaders.beton import ALLOCATION, FIELD, HEADER, RAW, Beton, read_beton, records
from fasttrain.loaders.datasets.hmdb51 import read_line as hmdb51_line
from fasttrain.loaders.datasets.kinetics import read_list as kinetics_list
from fasttrain.loaders.datasets.labels import csv_rows, name_labels
from fasttrain.loaders.datasets.listed import _parse
from fasttrain.loaders.datasets.places365 import read_categories
from fasttrain.loaders.datasets.tar import _pax
from fasttrain.loaders.datasets.ucf101 import read_classes
from fasttrain.loaders.datasets.ucf101 import read_line as ucf101_line
from fasttrain.loaders.datasets.voc import CLASSES as VOC
from fasttrain.loaders.datasets.voc import _shown
from hypothesis import example, given
from hypothesis import strategies as st

from fasttrain.recipe import read_yaml
from fasttrain.sources.cache import _HEADER, _MAGIC, CacheError, Form, SoftLabelFile

_EDGES = st.sampled_from([0, 1, 2, 5, 16, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


@contextmanager
def written(content: bytes | str, name: str):
    """A file of this content, where only this example sees it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        yield path


def clear(error: ValueError, named: Path | str, line: int = 0) -> None:
    """Asserts that a message is one sentence that names the file, and the line."""
    message = str(error)
    assert str(named) in message and "\n" not in message, message
    assert not line or f"line {line}" in message, message


# packed files


@st.composite
def betons(draw):
    """A file of raw images whose numbers are right, but for some that are drawn."""
    count = draw(st.integers(1, 4))
    side_N = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    kind, first = records(1), 24 + 2 * FIELD.itemsize + count * records(1).itemsize
    header, fields = np.zeros(1, dtype=HEADER), np.zeros(2, dtype=FIELD)
    record_N, table_N = np.zeros(count, dtype=kind), np.zeros(count, dtype=ALLOCATION)
    size_N = 3 * np.array(side_N) ** 2
    ptr_N = first + np.cumsum(size_N) - size_N
    end = first + int(size_N.sum())
    header["version"], header["fields"], header["page"], header["samples"], header["table"] = 2, 2, 1 << 21, count, end
    fields["type"] = 2, 1
    record_N["f0"]["mode"], record_N["f0"]["width"], record_N["f0"]["height"] = RAW, side_N, side_N
    record_N["f0"]["ptr"], record_N["f1"] = ptr_N, np.arange(count)
    table_N["sample"], table_N["ptr"], table_N["size"] = np.arange(count), ptr_N, size_N
    places = [(header, name) for name in ("version", "fields", "samples", "table")]
    places += [(record_N["f0"], name) for name in ("mode", "width", "height", "ptr")]
    places += [(table_N, name) for name in ("ptr", "size")] + [(fields, "type")]
    for _ in range(draw(st.integers(0, 2))):
        array, name = draw(st.sampled_from(places))
        value = draw(_EDGES | st.integers(0, 2 * end)) % (1 << 8 * array.dtype[name].itemsize)
        array[name][draw(st.integers(0, len(array) - 1))] = value
    pixels = bytes(i % 251 for i in range(end - first))
    return b"".join([header.tobytes(), fields.tobytes(), record_N.tobytes(), pixels, table_N.tobytes()])


def oracle_of(content: bytes) -> list[tuple[int, int, bytes]] | None:
    """(height, width, pixels) of each image, by plain Python; None where some number cannot be."""
    head = np.frombuffer(content, HEADER, 1)[0]
    n, table = int(head["samples"]), int(head["table"])
    kinds = [int(content[24 + i * FIELD.itemsize]) for i in range(2)]
    start = 24 + 2 * FIELD.itemsize
    if int(head["version"]) != 2 or int(head["fields"]) != 2 or kinds != [2, 1] or not n:
        return None
    if start + records(1).itemsize * n > table or table >= len(content) or (len(content) - table) % 24:
        return None
    allocations: dict[int, set[int]] = {}
    for _, ptr, size in (map(int, row) for row in np.frombuffer(content[table:], ALLOCATION)):
        if size and (ptr < 24 or ptr + size > table):
            return None
        allocations.setdefault(ptr, set()).add(size)
    out = []
    for row in np.frombuffer(content, records(1), n, start):
        mode, width, height, ptr = (int(row["f0"][name]) for name in ("mode", "width", "height", "ptr"))
        sizes = allocations.get(ptr, set())
        if len(sizes) != 1 or mode > 1 or not width * height:
            return None
        (size,) = sizes
        if size != 3 * width * height if mode == RAW else width * height > 512 * size:
            return None
        out.append((height, width, content[ptr : ptr + size]))
    return out


@given(betons(), st.none() | st.integers(0, 1 << 14))
def test_betons_of_arbitrary_numbers(content, end):
    whole = content if end is None else content[:end]
    right = oracle_of(whole) if end is None or end >= len(content) else None
    with written(whole, "x.beton") as path:
        file: Beton | None
        try:
            file = read_beton(path)
        except ValueError as error:
            clear(error, path)
            file = None
    if file is None:
        assert right is None
        return
    assert right is not None or end is not None  # what is cut off may still be whole, of fewer samples
    for i, (height, width, pixels) in enumerate(right or ()):
        ptr, size = int(file.ptr_N[i]), int(file.size_N[i])
        assert (file.height_N[i], file.width_N[i], whole[ptr : ptr + size]) == (height, width, pixels)
    assert all(p >= 0 and p + s <= len(whole) for p, s in zip(file.ptr_N.tolist(), file.size_N.tolist(), strict=True))


# caches

_PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | _TEXT
_VALUES = st.recursive(_PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(_TEXT, x, max_size=3), max_leaves=6)


@given(_VALUES, st.booleans(), st.booleans(), st.integers(-3000, 3000))
def test_headers_of_caches(value, is_sealed, is_ours, more):
    about = {"weights": "abc"}
    ours = {**about, "labels": {"views": 1, "samples": 4, "kept": "float16 logits"}}
    header = json.dumps(ours if is_ours else value).encode()
    head = _MAGIC + len(header).to_bytes(4, "little") + (zlib.crc32(header) ^ (not is_sealed)).to_bytes(4, "little")
    content = (head + header).ljust(_HEADER, b"\0") + bytes(_HEADER + 4 * 6)
    content = content[:more] if more < 0 else content + bytes(more)
    with written(content, "a.soft") as path:
        try:
            file = SoftLabelFile(path, about, views=1, samples=4, form=Form(3))
        except CacheError as error:
            clear(error, path)
            assert not (is_ours and is_sealed and not more)
            return
        assert is_ours and is_sealed and not more and not file.count()
        file.close()


# lists

_CELLS = _TEXT | st.sampled_from(["a.png", "b.png", "1", "cat|dog", "train", "-7"])
_ROWS = st.lists(st.lists(_CELLS, min_size=1, max_size=4), max_size=5)
_HEADERS = ["path,label", "path,label,split", "labels,path", "Path, LABEL ", "path", "path,path,label"]
_OBJECTS = st.fixed_dictionaries({"path": _TEXT, "label": st.integers() | _TEXT})


@given(_ROWS, st.sampled_from(_HEADERS))
def test_csv_lists(rows, header):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    columns = [c.strip().lower() for c in header.split(",")]
    with written(f"{header}\n{out.getvalue()}", "list.csv") as path:
        try:
            found = list(csv_rows(path))
        except ValueError as error:
            clear(error, path)
            wrong = any(len(row) != len(columns) for row in rows) or len(set(columns)) < len(columns)
            assert wrong or any('"' in cell or "\r" in cell or cell.startswith(" ") for row in rows for cell in row)
            return
        kept = [row for row in rows if any(row)]
        assert len(found) == len(kept)
        for (_, cells), row in zip(found, kept, strict=True):
            if "path" in cells and not row[columns.index("path")].startswith(" "):
                assert cells["path"] == row[columns.index("path")]
        try:
            lines, names, labels, splits = _parse(path)
        except ValueError as error:
            clear(error, path)
            return
    assert len(lines) == len(names) == len(labels) == len(kept) and all(names)
    assert splits is None or set(splits) <= {"train", "val", "test"}


@given(st.lists(_VALUES | _OBJECTS, min_size=1, max_size=4))
def test_jsonl_lists(rows):
    def good(row: object) -> bool:
        if not isinstance(row, dict) or set(row) & {"labels", "split"} or not row.get("path") or "label" not in row:
            return False
        label = row["label"]
        is_text = isinstance(label, str) and bool(label.strip())
        return isinstance(row["path"], str) and (is_text or (isinstance(label, int) and not isinstance(label, bool)))

    first_bad = next((i for i, row in enumerate(rows, start=1) if not good(row)), 0)
    with written("\n".join(map(json.dumps, rows)), "list.jsonl") as path:
        try:
            lines, names, labels, splits = _parse(path)
        except ValueError as error:
            clear(error, path, first_bad)
            assert first_bad
            return
    assert not first_bad and splits is None and lines == list(range(1, len(rows) + 1))
    assert [names, labels] == [
        [r["path"] for r in rows],
        [x.strip() if isinstance(x := r["label"], str) else x for r in rows],
    ]


_LABELS = st.integers(-2, 12) | st.sampled_from(["0", "7", "cat", "dog", "-1", "99999", "1e3", "٣"])


@given(
    st.lists(_LABELS, min_size=1, max_size=8),
    st.none() | st.lists(st.sampled_from(["cat", "dog", "0", "7"]), max_size=3),
)
def test_labels_get_classes(labels, named):
    content = "" if named is None else "\n".join(named)
    with written(content, "classes.txt" if named is not None else "other.txt") as path:
        try:
            classes, targets_N = name_labels(labels, np.arange(len(labels)), path.parent, lambda i: f"{path}, line {i}")
        except ValueError as error:
            clear(error, path.parent)
            return
    assert len(targets_N) == len(labels) and 0 <= targets_N.min() <= targets_N.max() < len(classes)
    for label, target in zip(labels, targets_N.tolist(), strict=True):
        assert label == target or str(label) == classes[target] or int(label) == target


_LINES = st.lists(
    st.sampled_from(["1 Archery", "2 Biking", "3 archery", "02 Dive", "0 a", "1 a/b", "x", "", " ", "3\tJump", "2"])
    | _TEXT,
    max_size=5,
)


@given(_LINES)
def test_class_lists_of_ucf101(lines):
    text = "\n".join(lines)
    with written(text, "classInd.txt") as path:
        try:
            classes = read_classes(path)
        except ValueError as error:
            clear(error, path)
            return
    given = dict(line.split() for line in text.split("\n") if line.strip())
    assert {int(number): name for number, name in given.items()} == dict(enumerate(classes, start=1))


@given(
    _TEXT
    | st.from_regex(r"(Archery|biking|Dive)/v_[A-Za-z/.]{1,4}_g[0-9]{1,2}_c0[0-9][.]avi( [0-9]{1,3})?", fullmatch=True)
)
def test_lines_of_ucf101(text):
    labels = {"archery": 0, "biking": 1}
    try:
        entry = ucf101_line(text, "train", labels, "x.txt, line 7")
    except ValueError as error:
        clear(error, "x.txt, line 7")
        return
    label, _, file = text.split()[0].partition("/")
    assert entry.label == labels[label.casefold()] and entry.file == file and "/" not in file
    assert len(text.split()) == 1 or int(text.split()[1]) == entry.label + 1


@given(_TEXT | st.from_regex(r"[a-z/._]{1,8}[.]avi +[0-3]", fullmatch=True))
def test_lines_of_hmdb51(text):
    try:
        entry = hmdb51_line(text, "wave", 3, "x.txt, line 7")
    except ValueError as error:
        clear(error, "x.txt, line 7")
        return
    file, _, number = text.rpartition(" ")
    assert (entry is None) == (number.strip() == "0")
    assert entry is None or (entry.file == file.strip() and "/" not in entry.file and entry.split in ("train", "test"))


@given(
    st.lists(
        _TEXT | st.sampled_from(["/a/bar 0", "/b/car/in 1", "/c/../x 2", "/a/bar 1", "/d/e  02", "a 1", ""]), max_size=5
    )
)
def test_categories_of_places365(lines):
    text = "\n".join(lines)
    with written(text, "categories_places365.txt") as path:
        try:
            found = read_categories(path, verify=False)
        except ValueError as error:
            clear(error, path)
            return
    right = {line.split()[0]: int(line.split()[1]) for line in text.split("\n") if line.strip()}
    assert found == right and sorted(found.values()) == list(range(len(found))) and all(".." not in c for c in found)


_IDS = st.sampled_from(["abcdefghijk", "-_-_-_-_-_-", "short", "../../../ab"])


@given(st.lists(st.tuples(_TEXT, _IDS, st.integers(-5, 10**7)), max_size=4))
def test_lists_of_kinetics(rows):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(
        [["label", "youtube_id", "time_start", "time_end"], *[(*r, 9) for r in rows]]
    )
    with written(out.getvalue(), "train.csv") as path:
        try:
            clips = kinetics_list(path)
        except ValueError as error:
            clear(error, path)
            return
    assert [c.stem for c in clips] == [f"{name}_{start:06}_000009" for _, name, start in rows]


# annotations and archives


_SHOWN = st.tuples(st.sampled_from([*VOC, "lion", ""]) | _TEXT, st.sampled_from(["0", "1", " 1 ", "2", "yes", None]))


@given(st.lists(_SHOWN, max_size=4), st.sampled_from(["annotation", "annotations"]), st.integers(0, 400))
@example([("dog", "0")], "annotation", 0)
def test_annotations_of_voc(objects, outermost, cut):
    parts = []
    for name, difficult in objects:
        more = "" if difficult is None else f"<difficult>{difficult}</difficult>"
        parts.append(f"<object>\n<name>{escape(name)}</name><part><name>head</name></part>{more}</object>\n")
    text = f"<{outermost}>{''.join(parts)}</{outermost}>"
    text = text[: len(text) - cut] if cut > 300 else text
    with written(text, "1.xml") as path:
        try:
            shown = _shown(path, "train")
        except ValueError as error:
            clear(error, path)
            try:
                tree = ElementTree.fromstring(text)
            except ElementTree.ParseError:
                return
            names = [(o.findtext("name") or "").strip() for o in tree.iter("object")]
            flags = [(o.findtext("difficult") or "0").strip() for o in tree.iter("object")]
            assert tree.tag != "annotation" or not names or not set(names) <= set(VOC) or not set(flags) <= {"0", "1"}
            return
    tree = ElementTree.fromstring(text)
    for place, name in enumerate(VOC):
        flags = [
            (o.findtext("difficult") or "0").strip() for o in tree.iter("object") if o.findtext("name").strip() == name
        ]
        assert shown[place] == (1 if "0" in flags else -1 if flags else 0)


@given(st.binary(max_size=24), st.sampled_from([b"path", b"size", b"mtime"]), st.integers(-2, 2))
def test_pax_records(value, key, wrong):
    body = key + b"=" + value + b"\n"
    length = len(body) + 3 + wrong
    record = b"%d %s" % (length, body)
    try:
        found = _pax(Path("x.tar"), record)
    except ValueError as error:
        clear(error, "x.tar")
        assert length != len(record) or (key == b"size" and not (value.isdigit() and len(value) < 20))
        return
    if length == len(record):
        assert found == {key: value}


@given(_VALUES, st.integers(0, 400))
@example({"a": float("inf")}, 0)
def test_yaml(value, cut):
    text = yaml.safe_dump(value, allow_unicode=True)
    text = text[: len(text) - cut] if cut > 300 else text
    with written(text, "x.yaml") as path:
        try:
            found = read_yaml(path)
        except ValueError as error:
            clear(error, path)
            with pytest.raises((yaml.YAMLError, ValueError)):
                yaml.safe_load(text)
            return
    assert repr(found) == repr(yaml.safe_load(text))
