"""kd, dml and maxl in the whole loop: they learn, go on exactly where they stopped, teach each other across rows, and say
what they cannot do."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from fasttrain.kernels import SoftTargetLoss, network_input

from fasttrain import compare
from fasttrain.build import build
from fasttrain.compare import jobs_of, run_jobs
from fasttrain.log import read_lines
from fasttrain.methods import METHODS, Setting
from fasttrain.recipe import Recipe, Source, load
from fasttrain.sources import SourceBank
from fasttrain.tasks import MultiLabel, SingleLabel
from fasttrain.trained import open_trained
from fasttrain.trainer import Trainer

from .test_command_line import nothing_written, refused
from .test_trainer import Stopped, fit

TEACHER = {"name": "teacher", "model": "fasttrain", "weights": "row:teacher", "classes": 3, "size": 12}
SMALL = ("--data.size", "12", "--data.stored", "12", "--run.eval_every", "100", "--run.tensorboard", "false")
ROWS = {
    "kd": {"method": {"name": "kd"}},
    "teacher": {"method": {"name": "scratch"}},
    "dml": {"method": {"name": "dml"}},
    "maxl": {"method": {"name": "maxl", "generator": "resnet20"}},
}
DML = ("--method.name", "dml")
MAXL = ("--method.name", "maxl", "--method.generator", "resnet20")


@pytest.fixture
def small(tmp_path):
    """A recipe of little work, with sources and rows."""

    def make(*overrides: str, rows: dict | None = None, sources: tuple[dict, ...] = (TEACHER,)) -> Recipe:
        recipe = load("smoke", ["--run.dir", str(tmp_path / "runs"), *SMALL, *overrides])
        return replace(recipe, rows=rows or {}, sources=[Source(**s) for s in sources])

    return make


@pytest.fixture
def from_a_file(tmp_path, fasttrain):
    """The command line on a recipe file with these rows and sources."""

    def call(rows: dict, *overrides: str, sources: tuple[dict, ...] = (TEACHER,)):
        content = yaml.safe_load((Path(__file__).parents[2] / "fasttrain/recipes/smoke.yaml").read_text())
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(content | {"rows": rows, "sources": list(sources)}))
        return fasttrain("train", "r.yaml", *SMALL, "--optim.epochs", "1", *overrides)

    return call


def test_each_method_learns(small, tmp_path):
    """Rows of which one learns from another's network: far above the third that guessing finds."""
    common = ("--optim.epochs", "6", "--data.batch", "20", "--optim.lr", "0.03", "--run.cosine_every", "9")
    ended: list[str] = []
    jobs = jobs_of(small(*common, rows=ROWS))
    summaries = run_jobs(
        jobs, tmp_path / "recall", lambda label, line: ended.append(label) if line["kind"] == "done" else None
    )
    assert ended == [f"{name}, seed 0" for name in ("teacher", "dml", "maxl", "kd")]
    cosines = {"kd": {"teacher"}, "teacher": set(), "dml": {"peer1"}, "maxl": {"subclasses"}}
    for job, summary in zip(jobs, summaries, strict=True):
        assert summary["test"]["accuracy"] > 50, job.row
        assert summary["steps"] == 42 * (1 + (job.row == "maxl"))
        lines = read_lines(job.folder, "step")
        primary = [line["primary"] for line in lines if "primary" in line]
        assert sum(primary[-3:]) < 0.7 * sum(primary[:3]), job.row
        measured = {n.removeprefix("cosine/"): v for line in lines for n, v in line.items() if n.startswith("cosine/")}
        assert set(measured) == cosines[job.row]
        assert all(0 < abs(value) <= 1 for value in measured.values())
    teacher, taught = (tmp_path / "runs/smoke" / name / "seed0" for name in ("teacher", "kd"))
    sha256 = hashlib.sha256((teacher / "checkpoints/selected.pt").read_bytes()).hexdigest()
    assert json.loads((taught / "summary.json").read_text())["sources"]["teacher"]["sha256"] == sha256


def test_rows_wait_for_the_rows_they_need(small, tmp_path, monkeypatch):
    """Side by side as well: what starts at once needs nothing that is not there. Peers and backbones start from rows, too."""
    scratch = {"method": {"name": "scratch"}}
    rows = {
        "third": {"method": {"name": "dml", "peer_weights": ["row:second"]}},
        "taught": {"method": {"name": "kd"}},
        "second": scratch | {"target": {"weights": "row:teacher"}},
        "teacher": scratch,
        "other": scratch,
    }
    common = ("--data.labelled", "32", "--data.batch", "16", "--optim.epochs", "1", "--run.parallel", "2")
    waves: list[list[str]] = []

    def at_once(jobs, count, recall, watch):
        assert count == 2 and all((f / "summary.json").is_file() for job in jobs for f in job.after)
        waves.append([job.row for job in jobs])
        return [compare._train(job, recall, lambda _: None) for job in jobs]

    monkeypatch.setattr(compare, "_side_by_side", at_once)
    recipe = small(*common, rows=rows)
    jobs = jobs_of(recipe)
    summaries = run_jobs(jobs, tmp_path / "recall", lambda label, line: None, parallel=2)
    assert waves == [["teacher", "other"], ["taught", "second"]]
    assert [job.row for job in jobs][-1] == "third"
    table = compare.tabulate(recipe, jobs, summaries, 2)
    assert [(row["name"], row["sources"]) for row in table["rows"]] == [
        (name, ["teacher"] if name == "taught" else []) for name in rows
    ]
    recipe = small(*common, "--seeds", "2", rows=rows)
    recipes = {(job.row, job.recipe.run.seed): job.recipe for job in jobs_of(recipe)}
    weights = [recipes["third", seed].method.peer_weights[0] for seed in (0, 1)]
    assert weights == [f"{recipe.run.dir}/smoke/second/seed{seed}/checkpoints/selected.pt" for seed in (0, 1)]
    assert recipes["taught", 1].sources[0].weights == f"{recipe.run.dir}/smoke/teacher/seed1"
    parts = build(recipes["third", 0])
    chosen, peer = torch.load(weights[0], weights_only=True)["target"], parts.method.companions["peer1"].state_dict()
    assert all(torch.equal(peer[k], v) for k, v in chosen.items() if k.startswith("backbone."))
    assert not torch.equal(parts.target.state_dict()["backbone.conv1.weight"], peer["backbone.conv1.weight"])


@pytest.mark.parametrize("variant", [DML, MAXL], ids=["dml", "maxl"])
def test_stopped_and_resumed_is_bit_identical(small, variant):
    """Companions too; maxl is stopped in both passes of its first epoch."""
    common = (*variant, "--data.labelled", "60", "--data.batch", "16", "--run.log_every", "1", "--optim.epochs", "2")
    whole = fit(small(*common, "--name", "whole"))
    stopped = small(*common, "--run.checkpoint_steps", "2", "--name", "stopped")
    for stop_at in (3, 5):
        with pytest.raises(Stopped):
            fit(stopped, stop_at)
    state = torch.load(Path(stopped.run.dir) / "stopped/checkpoints/last.pt", weights_only=True)
    assert state["position"] == {
        "epoch": 0 if variant == MAXL else 1,
        "pass": int(variant == MAXL),
        "step": 6,
        "finished": False,
    }
    folder = fit(stopped)
    assert losses(whole) == losses(folder) and len(losses(whole)) == (16 if variant == MAXL else 8)
    assert [read_lines(f, "eval")[-1] for f in (whole,)] == [read_lines(f, "eval")[-1] for f in (folder,)]
    first, second = (torch.load(f / "checkpoints/last.pt", weights_only=True) for f in (whole, folder))
    for part in ("target", "companions"):
        assert all(torch.equal(first[part][k], second[part][k]) for k in first[part]) and first[part]


def losses(folder: Path) -> list[dict[str, float]]:
    """Of each step, all that the method reports."""
    return [
        {k: v for k, v in line.items() if re.search("loss|primary|aux|entropy", k)}
        for line in read_lines(folder, "step")
    ]


@pytest.mark.parametrize("order", ["second", "first"])
def test_each_pass_of_maxl_trains_one_network(small, order, monkeypatch):
    """Bit for bit: the second leaves weights, momentum and running statistics of the target as they are, the first the
    generator's weights; both passes see the same batches."""
    recipe = small(*MAXL, "--method.order", order, "--data.labelled", "32", "--data.batch", "16", "--optim.epochs", "2")
    (job,) = jobs_of(recipe)
    trainer = Trainer(build(recipe), job.folder, job.folder / "recall", lambda _: None)
    generator, changed, seen = trainer.method.generator, [], []
    train_pass, take_step = trainer._train_pass, trainer._take_step

    def state() -> dict[str, dict]:
        momentum = {i: s["momentum_buffer"] for i, s in enumerate(trainer.optimisers[0].state.values()) if s}
        networks = {"target": trainer.target.state_dict(), "generator": dict(generator.named_parameters())}
        networks["momentum"] = momentum
        return {n: {k: v.detach().clone() for k, v in tensors.items()} for n, tensors in networks.items()}

    def watched() -> None:
        before = state()
        train_pass()
        after = state()
        differ = {
            n for n in after if any(k not in before[n] or not torch.equal(before[n][k], v) for k, v in after[n].items())
        }
        changed.append((trainer.number, differ))

    def step(ready) -> int:
        seen.append((trainer.number, ready.batch.index.tolist(), ready.batch.pixels.clone()))
        return take_step(ready)

    monkeypatch.setattr(trainer, "_train_pass", watched)
    monkeypatch.setattr(trainer, "_take_step", step)
    trainer.fit()
    assert changed == [(0, {"target", "momentum"}), (1, {"generator"})] * 2
    assert [number for number, *_ in seen] == [0, 0, 1, 1] * 2
    for i in (0, 1, 4, 5):
        assert seen[i][1] == seen[i + 2][1] and torch.equal(seen[i][2], seen[i + 2][2])
    assert not trainer.optimisers[1].state_dict()["param_groups"][0]["momentum"]


def test_a_trained_run_is_a_source(small, tmp_path):
    """It says what the run says, and does not pass for another data set's, size's or normalisation's."""
    recipe = small("--method.name", "scratch", "--data.labelled", "48", "--optim.epochs", "1", "--target.width", "1")
    folder = fit(recipe)
    spec = Source(**TEACHER | {"weights": str(folder)})
    network, parts = open_trained(spec), build(recipe)
    parts.target.load_state_dict(torch.load(folder / "checkpoints/selected.pt", weights_only=True)["target"])
    batch = next(iter(parts.loaders["val"]))
    mean, std = (torch.tensor(v) for v in (recipe.data.mean, recipe.data.std))
    with torch.no_grad():
        logits_BK = parts.target.eval()(network_input(batch.pixels, mean, std)).logits_BK
    assert torch.equal(network(batch.pixels), logits_BK)
    for strategy in ("plain", "folded"):
        bank = SourceBank([network], torch.float32, strategy=strategy)
        assert torch.allclose(bank(batch).logits_BC, logits_BK, atol=1e-4)
    wrong = {"classes": 4, "size": 16, "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0], "sha256": "0000"}
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=rf"sources: teacher.*{'SHA-256' if field == 'sha256' else field}"):
            open_trained(replace(spec, **{field: value}))
    with pytest.raises(ValueError, match="sources: teacher: there is no run or checkpoint /no/such"):
        open_trained(replace(spec, weights="/no/such"))
    names = parts.dataset.classes
    assert open_trained(spec, names).spec == spec
    with pytest.raises(ValueError, match=re.escape(f"its {names[0]!r} stands where {names[1]!r} should")):
        open_trained(spec, (names[1], names[0], *names[2:]))


def test_rows_that_need_rows(small, from_a_file, tmp_path):
    """One sentence each, before anything is written."""
    kd, scratch, source = {"method": {"name": "kd"}}, {"method": {"name": "scratch"}}, {**TEACHER, "weights": "row:b"}
    for rows in ({"a": kd, "c": scratch}, {"b": kd, "c": scratch}):  # no such row, the row itself
        said = f"sources: teacher: weights: row:b is no other row of the recipe; there are {', '.join(rows)}"
        with pytest.raises(ValueError, match=said):
            jobs_of(small(rows=rows, sources=(source,)))
    circle = {"a": kd, "b": {**scratch, "target": {"weights": "row:a"}}}
    refused(from_a_file(circle, sources=(source,)), "rows: a, b need each other's weights")
    nothing_written(tmp_path)


def test_a_teacher_that_does_not_fit_is_found_before_it_is_trained(from_a_file, tmp_path):
    rows = {"kd": {"method": {"name": "kd"}}, "teacher": {"method": {"name": "scratch"}}}
    for field, value, said, parallel in (
        ("size", 16, "sources: teacher has size 16, but the row teacher was trained with 12", "1"),
        ("classes", 5, "kd needs teachers with the task's own 3 classes, and the source teacher has 5", "2"),
    ):
        other = from_a_file(rows, "--run.parallel", parallel, "--seeds", parallel, sources=({**TEACHER, field: value},))
        refused(other, said)
    nothing_written(tmp_path)


def test_mistakes_on_the_command_line(fasttrain, tmp_path):
    for arguments, said in (
        ((*DML, "--method.peers", "[]"), "method.peers: dml needs at least one peer"),
        ((*DML, "--method.peers", "[resnet21]"), "method.peers: no backbone is called 'resnet21'"),
        ((*MAXL, "--run.precision", "fp16"), "run.precision: fp16 cannot hold maxl's gradients"),
    ):
        refused(fasttrain("train", "smoke", *SMALL, *arguments), said)
    nothing_written(tmp_path)


MISTAKES = {
    "peer of clips": (
        "dml",
        {"method.peers": ["resnet3d18"]},
        "method.peers: resnet3d18 takes clips, but with data.frames 0",
    ),
    "peers' weights": ("dml", {"method.peer_weights": [None, None]}, "method.peer_weights: 2 for 1 peers"),
    "no weights": (
        "dml",
        {"method.peer_weights": ["/no/such"]},
        "method.peer_weights: there is no weights file /no/such",
    ),
    "no generator": ("maxl", {"method.generator": "vgg"}, "method.generator: no backbone is called 'vgg'"),
    "one": ("maxl", {"method.subclasses": 1}, "method.subclasses: 1, but maxl needs at least 2"),
    "parts": ("maxl", {"run.accumulate": 2}, "run.accumulate: 2, but maxl takes whole batches"),
    "smoothing": ("maxl", {"optim.label_smoothing": 0.1}, "optim.label_smoothing: 0.1, but maxl"),
    "teacher": ("kd", {}, "kd needs teachers with the task's own 3 classes, and the source tiny has 1000"),
    "nobody": ("kd", {"transfer.sources": []}, "sources: kd needs at least one"),
}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load("smoke")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, recipe):
    name, fields, said = MISTAKES[mistake]
    for field, value in {"method.name": name, **fields}.items():
        group, _, key = field.partition(".")
        recipe = replace(recipe, **{group: replace(getattr(recipe, group), **{key: value})})
    with pytest.raises(ValueError, match=re.escape(said)):
        build(recipe)


def test_what_multi_label_tasks_refuse(recipe):
    task = MultiLabel(3)
    with pytest.raises(ValueError, match=r"method\.name: maxl parts single classes into sub-classes"):
        METHODS["maxl"].check(recipe, task)
    kept = replace(recipe, sources=[], transfer=replace(recipe.transfer, recall_top=2))
    with pytest.raises(ValueError, match=r"transfer\.recall_top: 2, but kd of a multi-label task needs all logits"):
        METHODS["kd"].check(kept, task)


def test_float16_chosen_by_the_device_is_refused(recipe):
    """``auto`` chooses it on GPUs without bfloat16."""
    setting = Setting(recipe, SingleLabel(3), "cuda", torch.float16, SoftTargetLoss, {"generator": torch.nn.Identity()})
    with pytest.raises(ValueError, match=r"run\.precision: fp16"):
        METHODS["maxl"](setting)
