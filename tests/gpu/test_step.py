"""On a CUDA device: sources in their own stream, recalled labels, the compiled step, and nothing that waits in the loop."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from fasttrain.build import build
from fasttrain.compare import jobs_of
from fasttrain.log import read_lines
from fasttrain.optim import build_optimiser
from fasttrain.recipe import Optim
from fasttrain.sources import RecalledSources, SourceBank
from fasttrain.trainer import Trainer

pytestmark = pytest.mark.gpu
TWO = (
    "[{name: a, model: test_resnet, weights: random, size: 64}, "
    "{name: b, model: test_resnet, weights: random, classes: 20, size: 64}]"
)


def trainer_of(recipe) -> Trainer:
    (job,) = jobs_of(recipe)
    return Trainer(build(job.recipe), job.folder, Path(recipe.run.dir) / "recall", lambda _: None)


@pytest.mark.parametrize("strategy", ["folded", "compiled", "stacked", "graphed"])
def test_the_bank_in_its_own_stream(smoke, strategy):
    """One batch ahead, while the current stream is busy: the same labels as plain networks, none overwritten by the next."""
    parts = build(smoke("--sources", TWO, "--data.drop_last", "true"))
    plain = SourceBank(parts.networks, torch.float32, strategy="plain")
    fast = SourceBank(parts.networks, torch.float16, strategy=strategy)
    batches = [batch for _ in range(5) for batch in parts.loaders["train"]]
    expected = [plain(batch).logits_BC for batch in batches]
    busy = torch.randn(2048, 2048, device="cuda")
    takes, found = [fast.start(batches[0])], []
    for k in range(len(batches)):
        if k + 1 < len(batches):
            takes.append(fast.start(batches[k + 1]))
        for _ in range(5):
            busy = (busy @ busy).clamp(-1, 1)
        found.append(takes[k]().logits_BC)
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b.float(), atol=0.02 * float(a.abs().max()))


@pytest.mark.parametrize("in_memory", [True, False])
def test_recalled_is_what_was_kept(smoke, tmp_path, in_memory):
    """Bit for bit what live sources said when the labels were met, in the type they are kept in."""
    parts = build(smoke("--sources", TWO, "--transfer.precision", "fp16", "--run.compile", "false"))
    recall = parts.open_sources(tmp_path, lambda _: None, in_memory=in_memory)
    assert isinstance(recall, RecalledSources)
    first: dict[tuple[int, int], torch.Tensor] = {}
    for _ in range(4):
        for batch in parts.loaders["train"]:
            logits_BC = recall.start(batch)().logits_BC
            assert logits_BC.is_cuda and logits_BC.dtype == torch.float16
            for index, view, row in zip(batch.index.tolist(), batch.view.tolist(), logits_BC, strict=True):
                assert torch.equal(first.setdefault((index, view), row), row)
    assert recall.computed == 2 * len(parts.train_spec.index_N)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("how", [("--transfer.recall", "false"), (), ("--method.name", "scratch")])
def test_nothing_waits_in_the_loop(smoke, precision, how):
    """PyTorch raises where the host would wait for the device."""
    trainer = trainer_of(
        smoke(
            "--run.precision", precision, "--run.compile", "false", "--optim.clip_norm", "1", "--optim.ema", "0.9", *how
        )
    )
    trainer.target.train()
    for _ in range(2):  # labels are met, and what is made once is made
        for ready in trainer._ahead():
            trainer._take_step(ready)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for ready in trainer._ahead():
            trainer._take_step(ready)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.clock.settle()
    assert {"data", "target", "optimiser"} <= set(trainer.clock.lately)


def test_live_and_recalled_train_alike(smoke, exact):
    curves = []
    for name, recall in (("live", "false"), ("recalled", "true")):
        common = ("--run.precision", "fp32", "--run.log_every", "1", "--run.compile", "false", "--name", name)
        trainer = trainer_of(smoke(*common, "--transfer.recall", recall, "--optim.lr", "0.001", "--optim.epochs", "4"))
        trainer.fit()
        curves.append([line["loss"] for line in read_lines(trainer.folder, "step")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.parametrize("compile_", ["true", "graphs"])
def test_the_compiled_step_learns(smoke, compile_):
    trainer = trainer_of(smoke("--run.compile", compile_, "--optim.epochs", "12", "--transfer.module", "true"))
    counters.clear()
    summary = trainer.fit()
    assert not counters["inductor"]["cudagraph_skips"]
    assert summary["test"]["accuracy"] > 80
    assert json.loads((trainer.folder / "summary.json").read_text())["time_share_percent"]["target"] > 0


def test_parts_of_a_batch_add_up_with_graphs(smoke, exact):
    """A replay overwrites what the one before it gave, gradients too."""
    curves = []
    for compile_ in ("false", "graphs"):
        common = (
            "--run.accumulate",
            "2",
            "--data.drop_last",
            "true",
            "--run.precision",
            "fp32",
            "--run.log_every",
            "1",
        )
        trainer = trainer_of(smoke(*common, "--optim.lr", "0.001", "--run.compile", compile_, "--name", compile_))
        trainer.fit()
        curves.append([line["loss"] for line in read_lines(trainer.folder, "step")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.parametrize("form", ["shared", "grouped"])
def test_transfer_modules_together(smoke, exact, form):
    curves = []
    for how in ((), ("--transfer.together", form, "--transfer.pad_to", "64", "--transfer.recompute", "true")):
        common = ("--sources", TWO, "--transfer.module", "true", "--run.precision", "fp32", "--run.compile", "false")
        recipe = smoke(*common, *how, "--run.log_every", "1", "--optim.lr", "0.001", "--name", f"r{len(how)}")
        trainer = trainer_of(recipe)
        trainer.fit()
        curves.append([line["loss"] for line in read_lines(trainer.folder, "step")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_apex_is_torch(need):
    """NVIDIA's FusedSGD takes the steps of torch's, where it is installed."""
    need("apex")
    spec, weights = Optim(lr=0.1, momentum=0.9, weight_decay=5e-4), []
    for impl in ("torch", "apex"):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5)).cuda()
        optimiser = build_optimiser(replace(spec, impl=impl), network)  # type: ignore[arg-type]
        for step in range(20):
            optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 20)
            network(torch.randn(16, 20, device="cuda")).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        weights.append([p.detach().clone() for p in network.parameters()])
    for a, b in zip(*weights, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
