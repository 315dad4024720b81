"""Export: every format says what the trained target says, holds nothing else, and its card's code runs."""

import hashlib
import json
import re
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
import yaml
from fasttrain.kernels import network_input
from huggingface_hub import ModelCard

import fasttrain as package
from fasttrain import checkpoint, model_card
from fasttrain import export as export_module
from fasttrain.build import build, build_target
from fasttrain.export import export, load
from fasttrain.inference import open_run
from fasttrain.recipe import from_dict
from fasttrain.recipe import load as load_recipe

from .test_command_line import refused
from .test_trainer import fit

SUFFIXES = ("pt2", "safetensors", "onnx")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short one with an auxiliary head and averaged weights; its folder."""
    torch.set_num_threads(1)
    small = ("--data.labelled", "60", "--data.size", "12", "--data.stored", "12", "--data.centre_share", "0.8")
    where = ("--run.dir", str(tmp_path_factory.mktemp("images")), "--run.tensorboard", "false")
    return fit(
        load_recipe("smoke", [*small, *where, "--optim.epochs", "1", "--optim.ema", "0.5", "--run.select", "last"])
    )


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> dict:
    """All formats of ``run`` and their card; what was said of them, and where they are."""
    folder = tmp_path_factory.mktemp("exported") / "new"
    return export(str(run), f"{folder}/") | {"folder": folder}


def said_by(path: Path, pixels: torch.Tensor) -> torch.Tensor:
    """The logits of an exported file."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
    model = load(path) if path.suffix == ".safetensors" else torch.export.load(path).module()
    with torch.no_grad():
        return model(pixels)


def test_every_format_has_the_figures_of_the_run(run, exported):
    """On the test split, from the loader's own bytes: another way than the check in ``export`` goes."""
    summary = json.loads((run / "summary.json").read_text())
    parts = build(from_dict(open_run(str(run))[1]["recipe"]))
    batch = next(iter(parts.loaders["test"]))
    for suffix in SUFFIXES:
        logits_BK = said_by(exported["folder"] / f"model.{suffix}", batch.pixels.float().contiguous())
        figures = parts.task.evaluate(logits_BK, batch.targets)
        assert figures == pytest.approx(summary["test"], rel=1e-4), suffix
    assert load(exported["folder"] / "model.safetensors")(batch.pixels).shape == (80, 3)  # bytes do, too


def test_nothing_but_the_target_is_in_the_files(run, exported):
    state = torch.load(run / "checkpoints/selected.pt", weights_only=True)
    assert any(k.startswith("aux_heads.") for k in state["target"])
    alone = {k: v for k, v in state["target"].items() if not k.startswith("aux_heads.")}
    folder = exported["folder"]
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert weights.keys() == alone.keys() and all(torch.equal(weights[k], alone[k]) for k in alone)
    program = torch.export.load(folder / "model.pt2")
    assert {k.removeprefix("target.") for k in program.state_dict} == alone.keys() | {"mean", "std"}
    values = sum(onnx.numpy_helper.to_array(i).size for i in onnx.load(folder / "model.onnx").graph.initializer)
    assert values < sum(v.numel() for v in alone.values()) + 200
    assert exported["parameters"] == 269_267


def test_files_name_no_place_of_the_machine_they_were_made_on(exported):
    """Programs keep stack traces otherwise."""
    folder = exported["folder"]
    places = [
        str(Path(package.__file__).parent).encode(),
        str(folder.parent).encode(),
        str(Path.home()).encode() + b"/",
    ]
    with zipfile.ZipFile(folder / "model.pt2") as file:
        contents = [file.read(name) for name in file.namelist()]
    contents += [path.read_bytes() for path in folder.iterdir()]
    assert [p for p in places for content in contents if p in content] == []


def test_averaged_weights_are_exported_from_every_checkpoint(run):
    state = torch.load(run / "checkpoints/last.pt", weights_only=True)
    selected, last = (open_run(str(run / f"checkpoints/{n}.pt"))[1]["target"] for n in ("selected", "last"))
    assert last.keys() == selected.keys() and all(torch.equal(last[k], selected[k]) for k in last)
    assert not torch.equal(state["target"]["head.weight"], last["head.weight"])


def code_in(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


def test_the_cards_code_runs(exported, monkeypatch, capsys):
    monkeypatch.chdir(exported["folder"])
    blocks = code_in(Path("README.md"))
    assert [len(block.splitlines()) for block in blocks] == [5, 5, 5]
    for block in blocks:
        exec(block, {})
        names = yaml.safe_load(capsys.readouterr().out)
        assert len(names) == 2 and set(names) <= set(exported["classes"])


def test_the_card_says_what_was_trained_how_and_how_well(run, exported):
    summary = json.loads((run / "summary.json").read_text())
    card = ModelCard.load(exported["folder"] / "README.md")
    assert card.data.library_name == "fasttrain" and card.data.license is None
    said = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert said == pytest.approx(summary["test"], abs=1e-4)
    for part in (
        "pixels [B, 3, 12, 12]",
        "the middle square brought to 12 px, and of that the middle square, 0.8 of the shorter side, brought to 12 px",
        "lying, standing, slanting",
        summary["sources"]["tiny"]["sha256"],
        "linear heads; cross entropy at T = 1, alpha = 1",
        "from epoch 1 (moving average, decay 0.5)",
        "the last epoch, whatever its figures; the test split is looked at once",
        f"{summary['val']['accuracy']:.2f} | {summary['test']['accuracy']:.2f}",
        f"{summary['images_per_s']:.1f} images/s",
        f"torch {torch.__version__.partition('+')[0]}",
        "No licence is stated.",
    ):
        assert part in card.text, part
    for file in exported["files"]:
        assert file["sha256"] == hashlib.sha256(Path(file["path"]).read_bytes()).hexdigest()
        assert f"| {file['sha256']} | {file['largest_difference']:.1e} |" in card.text
        assert file["largest_difference"] <= 1e-4 * exported["largest_logit"]


def test_what_the_card_says_of_other_runs(run):
    state = open_run(str(run))[1]
    content = {"model": "resnet20", "parameters": 1, "classes": ["a|b", "c"], "input": [3, 12, 12], "files": []}
    content["largest_logit"] = 1.0

    def card(*overrides: str, metric: str = "accuracy") -> str:
        return model_card.text(from_dict(state["recipe"], list(overrides)), state | {"metric": metric}, None, content)

    plain = card()
    assert "model-index" not in plain and "the test split was not looked at yet" in plain and r"a\|b, c" in plain
    sources = "[{name: t, model: m, weights: /home/me/w.pth, sha256: '0123'}]"
    named = card("--sources", sources, "--target.weights", "/home/me/v.pth")
    assert "weights w.pth" in named and "weights 0123" in named and "started from | v.pth" in named
    assert "/home/me" not in named
    assert "T = 4, weight 0.9 of 1" in card("--method.name", "kd")
    peers = ("--method.name", "dml", "--method.peers", "[resnet32, resnet20]")
    assert "settings | peers resnet32, resnet20" in card(*peers)
    assert "settings | peers resnet32, resnet20 from p.pth" in card(
        *peers, "--method.peer_weights", "[null, /home/me/p.pth]"
    )
    assert "5 sub-classes of each class" in card("--method.name", "maxl")
    modules = ("--transfer.module", "true", "--transfer.width", "48", "--transfer.loss", "kd")
    halved = card(*modules, "--transfer.kd_reduction", "mean")
    assert "transfer modules (of width 48, sum of the branches); divergence over the class count at T = 1" in halved
    paper = card("--run.protocol", "paper", "--run.select", "best")
    assert "best on the test split itself" in paper and "too good by what selecting gains" in paper
    assert "sigmoid" in card(metric="map") and "softmax" in plain
    within = model_card.text(from_dict(state["recipe"]), {"position": {"epoch": 3}}, None, content)
    assert "from epoch 3" in within and "Not known" in within


def test_exported_weights_start_another_run(exported, smoke):
    file = exported["folder"] / "model.safetensors"
    other = smoke("--target.weights", str(file), "--data.size", "16")
    target = build_target(other, 5, {})
    wanted = load(file).target.backbone.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in target.backbone.state_dict().items())
    assert f"{len(wanted)} tensors" in target.origin


def test_clips(tmp_path, monkeypatch, capsys):
    recipe = load_recipe("motion", ["--data.frames", "4", "--data.stride", "2", "--data.size", "12"])
    recipe.rows, recipe.target.width, recipe.target.weights = {}, 0.125, None
    target = build_target(recipe, 6, {}).eval()
    names = [f"motion {i}" for i in range(6)]
    checkpoint.save(
        tmp_path / "net.pt", {"target": target.state_dict(), "classes": names, "recipe": asdict(recipe), "epoch": 1}
    )
    content = export(str(tmp_path / "net.pt"), str(tmp_path / "net.onnx"))
    assert content["input"] == [3, 4, 12, 12] and content["card"] is None
    export(str(tmp_path / "net.pt"), str(tmp_path / "net.safetensors"))
    clip = torch.randint(0, 256, (5, 3, 4, 12, 12)).float()
    mean, std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
    with torch.no_grad():
        wanted = target(network_input(clip.byte(), mean, std)).logits_BK
    for suffix in ("onnx", "safetensors"):
        assert torch.allclose(said_by(tmp_path / f"net.{suffix}", clip), wanted, atol=1e-4 * float(wanted.abs().max()))
    monkeypatch.chdir(tmp_path)
    (block,) = code_in(tmp_path / "net.md")
    exec(block, {})
    assert set(yaml.safe_load(capsys.readouterr().out)) <= set(names)
    assert "4 frames 2 apart, of each the middle square brought to 12 px" in (tmp_path / "net.md").read_text()


def test_a_file_that_says_something_else_is_not_left_behind(run, tmp_path, monkeypatch):
    save = safetensors.torch.save_file

    def damaged(tensors, *others):
        save(tensors | {"head.bias": tensors["head.bias"] + 0.01}, *others)

    monkeypatch.setattr(export_module.safetensors.torch, "save_file", damaged)
    with pytest.raises(ValueError, match=r"net\.safetensors is not the target: its logits differ by 0\.01 where"):
        export(str(run), str(tmp_path / "out/net.safetensors"))
    state = torch.load(run / "checkpoints/selected.pt", weights_only=True)
    state["target"]["head.bias"][0] = torch.nan
    checkpoint.save(tmp_path / "nan.pt", state)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="differ by nan"):
        export(str(tmp_path / "nan.pt"), str(tmp_path / "out/net.safetensors"))
    assert [p.name for p in tmp_path.iterdir()] == ["nan.pt"]


def test_a_network_that_cannot_be_exported_is_refused(fasttrain, run, tmp_path, monkeypatch):
    def unknown(*arguments, **options):
        raise RuntimeError("no decomposition\n of aten.odd")

    monkeypatch.setattr(torch.export, "export", unknown)
    said = "resnet20 cannot be exported as a program (no decomposition of aten.odd); .safetensors takes its weights"
    refused(fasttrain("export", str(run), "--out", "new/"), said)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(fasttrain, run, tmp_path):
    done = fasttrain("export", str(run), "--out", "net.safetensors")
    assert done.returncode == 0, done.stderr
    assert "net.safetensors: resnet20, 3 classes, pixels float32 [B, 3, 12, 12] of 0 to 255" in done.stdout
    assert "its logits differ from the target's by 0.0e+00 at most" in done.stdout and "\nnet.md: " in done.stdout
    again = fasttrain("export", str(run), "--json", "--out", "more/net.safetensors")
    content = json.loads(again.stdout)
    assert content["card"] == "more/net.md" and (tmp_path / "more/net.md").is_file()
    (file,) = content["files"]
    assert file["format"] == "safetensors" and file["bytes"] == (tmp_path / "more/net.safetensors").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["more", "net.md", "net.safetensors"]


def test_mistakes(fasttrain, run, tmp_path, monkeypatch):
    name = str(run)
    refused(fasttrain("export"), "export needs a run's folder or a checkpoint, and --out FILE")
    refused(fasttrain("export", name), "and --out FILE or --out DIR/")
    refused(fasttrain("export", name, "--out"), "--out needs a value")
    refused(fasttrain("export", name, "--out", "a.pt2", "--data.size", "9"), "what is '--data.size'?")
    refused(fasttrain("export", "nothing", "--out", "a.safetensors"), "there is no checkpoint nothing")
    refused(fasttrain("export", str(tmp_path), "--out", "a.safetensors"), "is no run's folder")
    refused(fasttrain("export", name, "--out", "a.bin"), "--out: a.bin has the suffix '.bin'", ".pt2", ".onnx", "DIR/")
    (tmp_path / "file").write_text("")
    refused(fasttrain("export", name, "--out", "file/"), "--out: file/ is a file")
    refused(fasttrain("export", name, "--out", "file/a.safetensors"), "file")
    (tmp_path / "file").unlink()
    (tmp_path / "README.md").write_text("# Mine\n")
    refused(fasttrain("export", name, "--out", "."), "would replace README.md, which fasttrain did not write")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(fasttrain("export", name, "--out", "a.onnx"), "ONNX needs onnxscript: pip install fasttrain[onnx]")
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_files_that_cannot_be_loaded(run, exported, tmp_path):
    good = exported["folder"] / "model.safetensors"
    (tmp_path / "text.safetensors").write_text("these are no tensors at all")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:90_000])
    tensors = safetensors.torch.load_file(good)
    safetensors.torch.save_file(tensors, tmp_path / "bare.safetensors")
    with safetensors.safe_open(good, "pt") as file:
        header = file.metadata()
    del tensors["head.bias"]
    safetensors.torch.save_file(tensors, tmp_path / "less.safetensors", header)
    for name, message in {
        "none": "there is no file",
        "text": "as safetensors",
        "cut": "as safetensors",
        "bare": "does not say what its weights are of",
        "less": "is of another network: Missing key.*head.bias",
    }.items():
        with pytest.raises(ValueError, match=message):
            load(tmp_path / f"{name}.safetensors")
