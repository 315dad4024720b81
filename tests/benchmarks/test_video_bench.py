"""The video benchmark: its made-up files are what they should be, its rows run, and its ratios are of its own rows."""

import json
from dataclasses import replace
from pathlib import Path

import av
import pytest
import sklearn.datasets
from fasttrain.benchmarks import clips, video

from fasttrain.cli import main
from tests.loaders.videos import write


@pytest.fixture
def photographs() -> list[Path]:
    return sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))


@pytest.mark.parametrize("kind", clips.KINDS)
def test_made_up_files(kind, photographs, tmp_path, monkeypatch):
    """Codec, size, key frames and bits a second of the data set that they stand for; made once."""
    monkeypatch.setitem(clips.KINDS, kind, replace(clips.KINDS[kind], frames=40))
    path = tmp_path / f"x{clips.KINDS[kind].suffix}"
    clips._film(path, kind, 3, *photographs[:2])
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        keys = [i for i, packet in enumerate(p for p in container.demux(stream) if p.size) if packet.is_keyframe]
        codec = stream.codec_context
        assert (codec.name, codec.width, codec.height) == {
            "ucf": ("mpeg4", 320, 240),
            "kinetics": ("h264", 340, 256),
        }[kind]
    assert keys == ([0, 12, 24, 36] if kind == "ucf" else [0])
    again = tmp_path / f"y{path.suffix}"
    clips._film(again, kind, 3, *photographs[:2])
    assert again.read_bytes() == path.read_bytes()


def test_rows_and_ratios(tmp_path, monkeypatch, capsys):
    """On small videos of our own."""
    monkeypatch.setattr(video, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(video, "_TURN", 0.1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = ["path,label"]
    for k in range(4):
        write(tmp_path / f"{k}.avi", "mpeg4", count=20, options={"g": "12", "bf": "0"})
        lines.append(f"{k}.avi,{'ab'[k % 2]}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    few = ["--frames", "4", "--size", "24", "--batch", "4", "--clips", "8", "--short-side", "40", "--repeats", "2"]
    rows = ["--rows", "pyav,dali,bare decord,packed,bare decode", "--workers", "1"]
    assert (
        main(["bench", "video", "--data", f"videos={tmp_path}", *few, *rows, "--json", str(tmp_path / "x.json")]) == 0
    )
    content = json.loads((tmp_path / "x.json").read_text())
    speed = {row["name"]: row["clips_per_s"] for row in content["rows"]}
    # decord's FFmpeg pads rows of these small videos where the CPU has AVX-512, and decord then cannot copy them
    lost = ["bare decord"] if "DECORDArrayCopyFromTo" in content["not_run"].get("videos bare decord", "") else []
    names = [name for name in ("pyav", "bare decord", "packed", "bare decode") if name not in lost]
    assert list(speed) == [f"videos {name}" for name in names]
    (packed,) = (row for row in content["rows"] if row["name"] == "videos packed")
    assert packed["relative_to"]["best plain"] == pytest.approx(speed["videos packed"] / speed["videos pyav"])
    assert len(packed["repeats"]) == 2 and set(packed["relative_to"]) == {
        "best plain",
        "bare decode",
        "bare decord",
    } - set(lost)
    assert "PyAV: codec mpeg4" in content["not_run"]["videos dali"]
    (about,) = content["sets"]
    assert about["frames"] == 80 and 0.5 < about["ssim_luminance"]["mean"] <= 1
    assert "SSIM in colour" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--sets", "ucf,hmdb"], "--sets: there is no 'hmdb'; there are ucf, kinetics"),
        (["--rows", "ffmpeg"], "--rows: there is no 'ffmpeg'"),
        (["--clips", "8"], "fewer --clips than --batch"),
        (["--speed", "9"], "what is --speed 9?"),
        (["--size", "x"], "invalid int value: 'x'"),
    ],
)
def test_mistakes(wrong, message, capsys):
    assert main(["bench", "video", *wrong]) == 2
    assert message in capsys.readouterr().err
