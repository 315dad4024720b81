"""Tiny data sets of random images and clips, in the formats of the data sets of the paper: to try a recipe without its data."""

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .datasets.voc import CLASSES as VOC

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_PLACES = (
    *("/a/airfield", "/a/apartment_building/outdoor", "/b/beach", "/c/canyon", "/f/field/wild", "/f/field_road"),
    *("/k/kitchen", "/o/ocean", "/r/river", "/z/zen_garden"),
)
_UCF101 = (
    *("ApplyEyeMakeup", "Archery", "BabyCrawling", "Basketball", "Biking", "Diving", "HulaHoop", "PlayingCello"),
    *("Surfing", "YoYo"),
)
_HMDB51 = ("brush_hair", "catch", "climb", "dive", "golf", "jump", "kick_ball", "run", "walk", "wave")
_ABOUT = "tiny.json"
_FRAMES = 24


@dataclass(frozen=True)
class _Plan:
    """What to write: the arguments of :func:`write_tiny`, complete."""

    name: str
    classes: int
    samples: int
    side: int
    seed: int

    @property
    def tests(self) -> int:
        """Test samples of each class."""
        return max(1, self.samples // 2)


def write_tiny(
    name: str, folder: Path, *, classes: int | None = None, samples: int = 6, side: int = 64, seed: int = 0
) -> Path:
    """Writes a tiny data set in the official format of a real one, which ``open_dataset(name, root, verify=False)`` reads.

    Images have a colour of their class, in noise; clips also move. The same arguments give the same files. A folder that
    they were written to already is left as it is; one that is new, or empty, gets all of them or none.

    Args:
        name: a key of :data:`TINY`.
        folder: to write to.
        classes: how many; None: as many as it takes. ``cifar10``, ``cifar100``, ``stl10``, ``fashion_mnist`` and ``voc`` have
            theirs.
        samples: training images or clips of each class, and half as many for the test (at least 1). With ``val_share`` 0.1
            one of 6 validates. In ``voc`` each class is shown by as many training images, together with another class.
        side: longer side in pixels, of files that may have any size (the data sets whose images are files; clips have 24
            frames).
        seed: of the random numbers.

    Returns:
        The root to open.

    Raises:
        ValueError: an unknown name, a number that the format has no room for, or a folder that holds anything else.
    """
    if name not in TINY:
        raise ValueError(f"name: there is no tiny {name!r}; there are {', '.join(TINY)}")
    write, least, most = TINY[name]
    plan = _Plan(name, least if classes is None else classes, samples, side, seed)
    if not least <= plan.classes <= most:
        right = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"classes: a tiny {name} has {right}, not {plan.classes}")
    if samples < 2 or side < 16 or side % 8:
        raise ValueError(
            f"samples, side: at least 2, and a multiple of 8 from 16 on, are expected, not {samples}, {side}"
        )
    if _written(folder) == asdict(plan):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(place, plan, np.random.default_rng(seed))
        (place / _ABOUT).write_text(json.dumps(asdict(plan)))
        place.chmod(0o755)
        try:
            os.replace(place, folder)
        except OSError as error:  # it is there, and not empty: another process may have been faster
            if _written(folder) != asdict(plan):
                raise ValueError(f"folder: {folder} holds something else: name one that is new or empty") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return folder


def _written(folder: Path) -> dict | None:
    """The plan of the tiny data set in a folder; None if there is none."""
    try:
        return json.loads((folder / _ABOUT).read_text())
    except (OSError, ValueError):
        return None


# pixels


def _pixels(rng: np.random.Generator, label_N: np.ndarray, height: int, width: int) -> np.ndarray:
    """Random images, each in a colour of its class: uint8 [N, H, W, 3]."""
    colour_N3 = np.stack([label_N * step % 256 for step in (67, 151, 223)], axis=1)
    noise_NHWC = rng.integers(-50, 51, (len(label_N), height, width, 3), dtype=np.int16)
    return np.clip(noise_NHWC + colour_N3[:, None, None].astype(np.int16), 0, 255).astype(np.uint8)


def _labels(rng: np.random.Generator, classes: int, count: int) -> np.ndarray:
    """``count`` of each class, in random order: int64 [N]."""
    return rng.permutation(np.repeat(np.arange(classes), count))


def _write_jpeg(path: Path, rng: np.random.Generator, label: int, side: int, number: int) -> None:
    """A photograph, upright or (an odd ``number``) lying."""
    height, width = (side, side * 3 // 4) if number % 2 == 0 else (side * 3 // 4, side)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_pixels(rng, np.array([label]), height, width)[0]).save(path, "JPEG", quality=85)


def _write_clip(path: Path, rng: np.random.Generator, label: int, side: int) -> None:
    """24 frames of MPEG-4 in an AVI, as UCF101 and HMDB51 have it: a texture that moves, each class its own way."""
    import av  # when it is asked for: images are written without PyAV

    height, width = side * 3 // 4, side
    coarse_HWC = _pixels(rng, np.array([label]), height // 4, width // 4)[0]
    texture_HWC = coarse_HWC.repeat(4, axis=0).repeat(4, axis=1)
    step = ((0, 2), (0, -2), (2, 0), (-2, 0), (1, 1))[label % 5]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="avi", options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream("mpeg4", rate=25, options={"qscale": "3", "flags": "+bitexact"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.gop_size, context.thread_count, context.codec_tag = 12, 1, "XVID"
        for number in range(_FRAMES):
            image_HWC = np.roll(texture_HWC, (number * step[0], number * step[1]), axis=(0, 1))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def _write_text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


# data sets that are few files


def _cifar10(root: Path, plan: _Plan, rng: np.random.Generator) -> None:
    train_N, test_N = (_labels(rng, plan.classes, count) for count in (plan.samples, plan.tests))
    batches = [
        *((f"data_batch_{i + 1}", part) for i, part in enumerate(np.array_split(train_N, 5))),
        ("test_batch", test_N),
    ]
    for name, label_N in batches:
        _write_pickle(root / "cifar-10-batches-py" / name, {**_planes(rng, label_N), "labels": label_N.tolist()})
    _write_pickle(root / "cifar-10-batches-py/batches.meta", {"label_names": list(_CIFAR10), "num_vis": 3072})


def _cifar100(root: Path, plan: _Plan, rng: np.random.Generator) -> None:
    for name, count in (("train", plan.samples), ("test", plan.tests)):
        label_N = _labels(rng, plan.classes, count)
        entry = {"fine_labels": label_N.tolist(), "coarse_labels": (label_N // 5).tolist()}
        _write_pickle(root / "cifar-100-python" / name, {**_planes(rng, label_N), **entry})
    names = {
        "fine_label_names": [f"fine{i:02}" for i in range(100)],
        "coarse_label_names": [f"coarse{i:02}" for i in range(20)],
    }
    _write_pickle(root / "cifar-100-python/meta", names)


def _planes(rng: np.random.Generator, label_N: np.ndarray) -> dict:
    """Rows of 32 x 32 red, green and blue values."""
    return {"data": _pixels(rng, label_N, 32, 32).transpose(0, 3, 1, 2).reshape(len(label_N), -1)}


def _write_pickle(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def _stl10(root: Path, plan: _Plan, rng: np.random.Generator) -> None:
    folder = root / "stl10_binary"
    _write_text(folder / "class_names.txt", list(_STL10))
    for name, count in (("train", plan.samples), ("test", plan.tests)):
        label_N = _labels(rng, plan.classes, count)
        (folder / f"{name}_X.bin").write_bytes(_pixels(rng, label_N, 96, 96).transpose(0, 3, 2, 1).tobytes())
        (folder / f"{name}_y.bin").write_bytes((label_N + 1).astype(np.uint8).tobytes())


def _fashion_mnist(root: Path, plan: _Plan, rng: np.random.Generator) -> None:
    folder = root / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    for name, count in (("train", plan.samples), ("t10k", plan.tests)):
        label_N = _labels(rng, plan.classes, count)
        image_NHW = _pixels(rng, label_N, 28, 28)[..., 0]
        content = {
            "images-idx3": struct.pack(">4B3i", 0, 0, 8, 3, *image_NHW.shape) + image_NHW.tobytes(),
            "labels-idx1": struct.pack(">4Bi", 0, 0, 8, 1, len(label_N)) + label_N.astype(np.uint8).tobytes(),
        }
        for kind, values in content.items():
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(values, mtime=0))


# data sets of image files


def _imagenet(root: Path, plan: _Plan, rng: np.random.Generator) -> None:
    """Class folders, a flat ``val``, and a development kit whose numbers go against the order of the WordNet ids."""
    wnids = [f"n{1440764 + 2679 * i:08}" for i in range(plan.classes)]
    for label, wnid in enumerate(wnids):
        for i in range(plan.samples):
            _write_jpeg(root / "train" / wnid / f"{wnid}_{i}.JPEG", rng, label, plan.side, i)
    label_N = _labels(rng, plan.classes, plan.tests)
    for i, label in enumerate(label_N.tolist()):
        _write_jpeg(root / f"val/ILSVRC2012_val_{i + 1:08}.JPEG", rng, label, plan.side, i)
    data = root / "ILSVRC2012_devkit_t12/data"
    _write_text(
        data / "ILSVRC2012_validation_ground_truth.txt", [str(plan.classes - label) for label in label_N.tolist()]
    )
    (data / "meta.mat").write_bytes(_meta(wnids[::-1]))


def _meta(wnids: list[str]) -> bytes:
    """``meta.mat`` of the classes 1, 2, .. and of one above them all."""
    from scipy.io import savemat  # when it is asked for: slow to import

    kinds = {"ILSVRC2012_ID": "f8", "WNID": "O", "words": "O", "gloss": "O", "num_children": "f8", "children": "O"}
    kinds |= {"wordnet_height": "f8", "num_train_images": "f8"}
    synsets = np.empty((len(wnids) + 1, 1), dtype=list(kinds.items()))
    for i, wnid in enumerate([*wnids, "n00001740"]):
        below = np.arange(1, len(wnids) + 1, dtype=np.float64) if i == len(wnids) else np.zeros(0)
        synsets[i, 0] = (i + 1, wnid, f"class {wnid}", "made up", len(below), below, int(len(below) > 0), 0)
    out = io.BytesIO()
    savemat(out, {"synsets": synsets}, do_compression=True)
    return b"MATLAB 5.0 MAT-file, made up".ljust(116) + out.getvalue()[116:]  # instead of the time of day


def _places365(root: Path, plan: _Plan, rng: np.random.Generator) -> None:
    categories = _PLACES[: plan.classes]
    _write_text(root / "categories_places365.txt", [f"{c} {label}" for label, c in enumerate(categories)])
    train = [(f"{c}/{i + 1:08}.jpg", label) for label, c in enumerate(categories) for i in range(plan.samples)]
    label_N = _labels(rng, plan.classes, plan.tests)
    val = [(f"Places365_val_{i + 1:08}.jpg", label) for i, label in enumerate(label_N.tolist())]
    for name, folder, listed in (("train_standard", "data_256", train), ("val", "val_256", val)):
        _write_text(root / f"places365_{name}.txt", [f"{file} {label}" for file, label in listed])
        for i, (file, label) in enumerate(listed):
            _write_jpeg(root / folder / file.lstrip("/"), rng, label, plan.side, i)


def _voc(root: Path, plan: _Plan, rng: np.random.Generator) -> None:
    """Image k shows the classes k and k + 10 (modulo 20), and of k + 3 a difficult object."""
    year, number = root / "VOCdevkit/VOC2007", 0
    for split, count in (("train", plan.samples), ("val", 2), ("test", plan.tests)):
        lines: list[list[str]] = [[] for _ in VOC]
        for k in range(len(VOC) * count // 2):
            number += 1
            _write_jpeg(year / f"JPEGImages/{number:06}.jpg", rng, k % 20, plan.side, k)
            difficult_by_class = {k % 20: 0, (k + 10) % 20: 0, (k + 3) % 20: 1}
            objects = [_voc_object(VOC[label], hard, plan.side) for label, hard in difficult_by_class.items()]
            text = f"<folder>VOC2007</folder><filename>{number:06}.jpg</filename>{''.join(objects)}"
            _write_text(year / f"Annotations/{number:06}.xml", [f"<annotation>{text}</annotation>"])
            for label, those in enumerate(lines):  # 1 shown, 0 by a difficult object, -1 not
                those.append(
                    f"{number:06} {-1 if label not in difficult_by_class else 1 - difficult_by_class[label]:2}"
                )
        for name, those in zip(VOC, lines, strict=True):
            _write_text(year / f"ImageSets/Main/{name}_{split}.txt", those)
        _write_text(year / f"ImageSets/Main/{split}.txt", [line[:6] for line in lines[0]])


def _voc_object(name: str, difficult: int, side: int) -> str:
    box = f"<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{side // 2}</xmax><ymax>{side // 2}</ymax></bndbox>"
    about = f"<pose>Unspecified</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{about}{box}</object>"


# data sets of clips


def _groups(plan: _Plan, split: int) -> set[int]:
    """Which clips of a class, 0 .., the official split 1, 2 or 3 tests."""
    return {((split - 1) * plan.tests + k) % (plan.samples + plan.tests) for k in range(plan.tests)}


def _ucf101(root: Path, plan: _Plan, rng: np.random.Generator) -> None:
    classes, lists = _UCF101[: plan.classes], root / "ucfTrainTestlist"
    _write_text(lists / "classInd.txt", [f"{i + 1} {name}" for i, name in enumerate(classes)])
    clips = [(label, k) for label in range(plan.classes) for k in range(plan.samples + plan.tests)]
    files = {(label, k): f"{classes[label]}/v_{classes[label]}_g{k + 1:02}_c01.avi" for label, k in clips}
    for clip, file in files.items():
        _write_clip(root / "UCF-101" / file, rng, clip[0], plan.side)
    for split in (1, 2, 3):
        tested = _groups(plan, split)
        trains = [f"{files[label, k]} {label + 1}" for label, k in clips if k not in tested]
        _write_text(lists / f"trainlist{split:02}.txt", trains)
        _write_text(lists / f"testlist{split:02}.txt", [files[label, k] for label, k in clips if k in tested])


def _hmdb51(root: Path, plan: _Plan, rng: np.random.Generator) -> None:
    for label, name in enumerate(_HMDB51[: plan.classes]):
        files = [f"film{k:02}_{name}_u_nm_np1_fr_med_0.avi" for k in range(plan.samples + plan.tests)]
        for file in files:
            _write_clip(root / "hmdb51_org" / name / file, rng, label, plan.side)
        for split in (1, 2, 3):
            tested = _groups(plan, split)
            lines = [f"{file} {2 if k in tested else 1} " for k, file in enumerate(files)]
            _write_text(root / f"testTrainMulti_7030_splits/{name}_test_split{split}.txt", lines)


# name -> what writes it, the fewest classes (what it has by itself), the most
TINY: dict[str, tuple[Callable[[Path, _Plan, np.random.Generator], None], int, int]] = {
    "cifar10": (_cifar10, 10, 10),
    "cifar100": (_cifar100, 100, 100),
    "fashion_mnist": (_fashion_mnist, 10, 10),
    "hmdb51": (_hmdb51, 2, len(_HMDB51)),
    "imagenet": (_imagenet, 4, 1000),
    "places365": (_places365, 4, len(_PLACES)),
    "stl10": (_stl10, 10, 10),
    "ucf101": (_ucf101, 2, len(_UCF101)),
    "voc": (_voc, 20, 20),
}
