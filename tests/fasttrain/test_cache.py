"""Files of soft labels: what is read is what was written, or nothing; also after kills, on full disks, by many at once."""

import errno
import multiprocessing
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttrain.sources.cache import CacheError, Form, SoftLabelFile, difference, read_about

ABOUT = {"weights": "abc", "view": {"views": 2, "pad": 4}}
FORMS = [Form(5), Form(5, "float32"), Form(5, top=2), Form(40_000, top=3)]


def opened(path: Path, form: Form = FORMS[0], about=ABOUT, views: int = 2, samples: int = 30) -> SoftLabelFile:
    return SoftLabelFile(path, about, views=views, samples=samples, form=form)


def at(*pairs: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    view_B, index_B = np.array(pairs, dtype=np.int64).T
    return view_B, index_B


@pytest.mark.parametrize("form", FORMS)
def test_what_was_written_is_read(tmp_path, form):
    file = opened(tmp_path / "a.soft", form)
    where = at((0, 3), (1, 3), (1, 29))
    logits_BC = torch.randn(3, form.classes) * 5
    logits_BC[1, -1] = 30.0  # the largest class number
    assert not file.known(*where).any()
    file.write(*where, form.records(logits_BC))
    again = opened(tmp_path / "a.soft", form)
    for reader in (file, again):
        assert reader.known(*where).all() and not reader.known(*at((0, 4), (0, 29))).any()
        read_B = reader.read(*where)
        if form.top:
            value_BK, index_BK = logits_BC.softmax(1).topk(form.top)
            assert np.array_equal(read_B["index"], index_BK.numpy())
            assert np.array_equal(read_B["value"], value_BK.half().numpy())
            assert read_B["index"][1, 0] == form.classes - 1
        else:
            assert np.array_equal(read_B["logits"], logits_BC.numpy().astype(form.dtype))
        assert reader.count() == 3
    assert np.array_equal(again.missing(1, np.arange(30)), np.setdiff1d(np.arange(30), [3, 29]))


def test_class_numbers_are_kept_whole():
    """float16 rounds numbers above 2048, and int16 ends at 32,767."""
    for classes in (2049, 2**15, 2**15 + 1, 60_000):
        logits_BC = torch.zeros(1, classes)
        logits_BC[0, -1] = 10
        assert Form(classes, top=1).records(logits_BC)["index"][0, 0] == classes - 1


def test_large_logits_stay_finite():
    assert np.isfinite(Form(2).records(torch.tensor([[1e6, -1e6]]))["logits"]).all()


def test_records_never_written_take_no_space(tmp_path):
    file = opened(tmp_path / "a.soft", Form(1000), samples=100_000)
    assert file.path.stat().st_size > 400e6 and file.path.stat().st_blocks * 512 < 1e6


@pytest.mark.parametrize(
    ("about", "how", "said"),
    [
        ({**ABOUT, "weights": "abd"}, {}, "weights is abc there, abd here"),
        ({**ABOUT, "view": {"views": 2, "pad": 0}}, {}, "view.pad is 4 there, 0 here"),
        (ABOUT, {"samples": 31}, "labels.samples is 30 there, 31 here"),
        (ABOUT, {"views": 3}, "labels.views is 2 there, 3 here"),
        (ABOUT, {"form": Form(5, "float32")}, "labels.kept is float16 logits there, float32 logits here"),
    ],
)
def test_labels_of_something_else_are_refused(tmp_path, about, how, said):
    opened(tmp_path / "a.soft").close()
    with pytest.raises(CacheError, match=r"a\.soft holds other soft labels: " + said):
        opened(tmp_path / "a.soft", about=about, **how)


def test_a_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "a.soft"
    opened(path).close()
    whole = path.stat().st_size
    for size in (whole - 1, 5000):
        os.truncate(path, size)
        with pytest.raises(CacheError, match=rf"cut short: {size} bytes of {whole}; remove it"):
            opened(path)
    for size in (3000, 100, 10, 0):
        os.truncate(path, size)
        with pytest.raises(CacheError, match=r"cut short|is no file of soft labels, or is damaged; remove it"):
            opened(path)


def test_what_is_no_such_file_is_refused(tmp_path):
    path = tmp_path / "a.soft"
    for content in (b"", b"hello", os.urandom(9000)):
        path.write_bytes(content)
        with pytest.raises(CacheError, match="no file of soft labels"):
            opened(path)


def test_a_damaged_record_counts_as_missing(tmp_path):
    """Any byte of it, or of its seal; and one that belongs elsewhere."""
    path, form = tmp_path / "a.soft", Form(5)
    where, record_B = at((1, 7), (1, 8)), form.records(torch.randn(2, 5))
    file = opened(path, form)
    file.write(*where, record_B)
    file.close()
    content = path.read_bytes()
    start = content.index(record_B[0].tobytes())
    seal = 4096 + 4 * (30 + 7)
    for place in [*range(start, start + 10), *range(seal, seal + 4)]:
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        assert opened(path, form).known(*where).tolist() == [False, True]
    swapped = bytearray(content)
    swapped[start : start + 10], swapped[start + 10 : start + 20] = (
        content[start + 10 : start + 20],
        content[start : start + 10],
    )
    path.write_bytes(swapped)
    assert opened(path, form).known(*where).tolist() == [False, False]


def test_a_full_disk_is_an_error_not_a_signal(tmp_path, monkeypatch):
    """Part of a record fits: the label counts as missing, those before it stay, and the file can be used."""
    file = opened(tmp_path / "a.soft")
    file.write(*at((0, 1)), file.form.records(torch.randn(1, 5)))
    write, room = os.pwrite, [25]

    def pwrite(to: int, content: bytes, offset: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = content[: room[0]]
        room[0] -= len(part)
        return write(to, part, offset)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "pwrite", pwrite)
        file.write(*at((0, 2), (0, 3), (0, 4)), file.form.records(torch.randn(3, 5)))
    again = opened(tmp_path / "a.soft")
    assert again.known(*at((0, 1), (0, 2), (0, 3), (0, 4))).tolist() == [True, False, False, False]
    again.write(*at((0, 3)), again.form.records(torch.randn(1, 5)))
    assert again.known(*at((0, 3))).all()


def test_a_really_full_disk(tmp_path):
    """A file system of 1 MiB; where it may not be mounted, the test above has to do."""
    mount = tmp_path / "small"
    mount.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(asked, capture_output=True).returncode:
        return
    try:
        form = Form(1000)
        with pytest.raises(CacheError, match=r"cannot be kept in .*small \(No space left"):
            opened(mount / "large.soft", form, samples=10**6)
        assert not list(mount.iterdir())
        file = opened(mount / "a.soft", form, samples=2000)
        with pytest.raises(OSError, match="No space left"):
            for index in range(2000):
                file.write(*at((0, index)), form.records(torch.full((1, 1000), index)))
        known = np.flatnonzero(file.known(np.zeros(2000, dtype=np.int64), np.arange(2000)))
        assert len(known) > 300
        assert all(file.read(*at((0, int(i))))["logits"][0, 0] == i for i in known)
        file.close()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


_WRITER = """
import os, sys, numpy as np, torch
from pathlib import Path
from fasttrain.sources.cache import Form, SoftLabelFile
file = SoftLabelFile(Path(sys.argv[1]), {"weights": "abc"}, views=1, samples=4000, form=Form(200, "float32"))
print("ready", flush=True)
index = 0
while True:
    part = np.arange(index, index + 20) % 4000
    record = file.form.records(torch.from_numpy(part)[:, None].expand(-1, 200).float())
    file.write(np.zeros(20, dtype=np.int64), part, record)
    index += 20
"""


def test_killed_writers_leave_no_wrong_label(tmp_path):
    """kill -9 at random moments; every label that counts as known is right."""
    path = tmp_path / "a.soft"
    for pause in (0.0, 0.004, 0.013):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        with suppress(subprocess.TimeoutExpired):
            writer.wait(pause)
        writer.kill()
        writer.wait()
        file = SoftLabelFile(path, {"weights": "abc"}, views=1, samples=4000, form=Form(200, "float32"))
        known = np.flatnonzero(file.known(np.zeros(4000, dtype=np.int64), np.arange(4000)))
        read = file.read(np.zeros(len(known), dtype=np.int64), known)["logits"]
        assert np.array_equal(read, np.broadcast_to(known[:, None], read.shape))
        file.close()


def _fill_some(path: Path, seed: int, started) -> None:
    started.wait()
    file = SoftLabelFile(path, {"weights": "abc"}, views=1, samples=600, form=Form(50, "float32"))
    order = np.random.default_rng(seed).permutation(600)
    for part in np.split(order, 60):
        known = file.known(np.zeros(10, dtype=np.int64), part)
        read = file.read(np.zeros(known.sum(), dtype=np.int64), part[known])["logits"]
        assert np.array_equal(read, np.broadcast_to(part[known][:, None], read.shape))
        new = part[~known]
        values = torch.from_numpy(new)[:, None].expand(-1, 50).float()
        file.write(np.zeros(len(new), dtype=np.int64), new, file.form.records(values))


def test_many_fill_one_file_together(tmp_path):
    """Four processes, the making of the file included, each in its own order; what one has written the others find."""
    context = multiprocessing.get_context("fork")
    started = context.Event()
    path = tmp_path / "a.soft"
    running = [context.Process(target=_fill_some, args=(path, seed, started)) for seed in range(4)]
    for process in running:
        process.start()
    started.set()
    for process in running:
        process.join()
        assert process.exitcode == 0
    file = SoftLabelFile(path, {"weights": "abc"}, views=1, samples=600, form=Form(50, "float32"))
    assert file.known(np.zeros(600, dtype=np.int64), np.arange(600)).all()
    assert [p.name for p in tmp_path.iterdir()] == ["a.soft"]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="soft labels cannot be kept in"):
        opened(tmp_path / "file" / "a.soft")
    with pytest.raises(CacheError, match="cannot be read"):
        read_about(tmp_path / "none.soft")


def test_differences_are_named():
    assert difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}) == (
        "b.c is 2 there, 3 here; d is not named there, 4 here"
    )
    assert difference(ABOUT, ABOUT) == ""
