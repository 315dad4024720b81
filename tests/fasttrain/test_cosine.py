"""Cosines between gradients: the numbers, and that measuring them changes nothing."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from fasttrain.kernels import SoftTargetLoss
from torch import Tensor, nn

from fasttrain.cosine import gradient_cosines
from fasttrain.log import read_lines
from fasttrain.methods import METHODS, Method, Setting
from fasttrain.recipe import Recipe, Source
from fasttrain.sources import SoftTargets
from fasttrain.tasks import SingleLabel
from fasttrain.transfer import LinearHead

from .test_methods import PARTS, B, K, Oracle, a_maxl, a_method, cross_entropy, doubled, images, kl, network, says
from .test_trainer import fit


def cosine(task: Tensor, aux: Tensor, w: dict[str, Tensor]) -> float:
    """Of two losses' gradients, by the parameters of the backbone."""
    body = [p for name, p in w.items() if name.startswith("backbone.")]
    a, b = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, body, retain_graph=True)]) for loss in (task, aux)
    )
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def sskt(kernels: str = "reference") -> tuple[Method, nn.Module, SoftTargets]:
    """With two sources, of 4 and 5 classes."""
    recipe = Recipe(sources=[Source("a", "random", classes=4), Source("b", "random", classes=5)])
    losses = partial(SoftTargetLoss, implementation=kernels, device="cpu")
    target = network(K)
    for source in recipe.sources:
        target.aux_heads[source.name] = LinearHead(6, source.classes)
    method = METHODS["sskt"](Setting(recipe, SingleLabel(K), "cpu", torch.float32, losses))
    return method, target, SoftTargets(2 * torch.randn(B, 9), (4, 5), ("a", "b"))


def test_of_sskt_by_hand():
    method, target, soft = sskt()
    x, y = images()
    found = gradient_cosines(method, target, x, y, soft)
    w = doubled(target)
    task, by_hand = cross_entropy(says(w, x.double()), y), {}
    for name, t in zip("ab", soft.logits_BC.double().split([4, 5], dim=1), strict=True):
        s = says(w, x.double(), f"aux_heads.{name}.linear")
        by_hand[name] = cosine(task, -(t.softmax(1) * s.log_softmax(1)).sum(1).mean(), w)
    assert {n: v.item() for n, v in found.items()} == pytest.approx(by_hand, abs=1e-5)


def test_of_kd_and_dml_by_hand():
    target, (x, y) = network(K), images()
    w, t = doubled(target), torch.randn(B, K)
    s = says(w, x.double())
    method = a_method("kd", SingleLabel(K), teachers=("t",))
    found = gradient_cosines(method, target, x, y, SoftTargets(t, (K,), ("t",)))
    follow = kl((t.double() / 4).softmax(1), (s / 4).softmax(1))
    assert found["t"].item() == pytest.approx(cosine(cross_entropy(s, y), follow, w), abs=1e-5) and len(found) == 1
    peers = {f"peer{i}": network(K) for i in (1, 2)}
    found = gradient_cosines(a_method("dml", SingleLabel(K), peers), target, x, y, None)
    assert set(found) == set(peers)
    for name, peer in peers.items():
        follow = kl(says(doubled(peer), x.double()).detach().softmax(1), s.softmax(1))
        assert found[name].item() == pytest.approx(cosine(cross_entropy(s, y), follow, w), abs=1e-5)


def test_of_maxl_by_hand():
    method, target, generator, x, y = a_maxl()
    found = gradient_cosines(method, target, x, y, None)
    oracle = Oracle(target, generator, x, y)
    aux = oracle.aux(oracle.theta, oracle.label(oracle.phi).detach())
    assert found["subclasses"].item() == pytest.approx(cosine(oracle.task(oracle.theta), aux, oracle.theta), abs=1e-5)


def test_without_auxiliary_losses_there_is_none():
    assert gradient_cosines(a_method("scratch", SingleLabel(K)), network(K), *images(), None) == {}


def test_of_a_frozen_backbone_it_is_0():
    method, target, soft = sskt()
    target.backbone.freeze(2)
    found = gradient_cosines(method, target, *images(), soft)
    assert {n: v.item() for n, v in found.items()} == {"a": 0, "b": 0}


def test_a_loss_of_the_task_itself_has_1():
    """A teacher that knows the labels pulls where they do."""
    x, y = images()
    sure = 30 * torch.nn.functional.one_hot(y, K).float()
    method = a_method("kd", SingleLabel(K), teachers=("t",), method={"temperature": 1.0})
    found = gradient_cosines(method, network(K), x, y, SoftTargets(sure, (K,), ("t",)))
    assert found["t"].item() == pytest.approx(1, abs=1e-5)


def states(*networks: nn.Module) -> list[Tensor]:
    return [t.clone() for made in networks for t in made.state_dict().values()]


@pytest.mark.parametrize("name", ["dml", "maxl"])
def test_nothing_changes(name):
    """Running statistics of all networks and the random state, of which dropout draws; no gradient is left behind."""
    companions = {"dml": {"peer1": network(K)}, "maxl": {"generator": network(K * PARTS)}}[name]
    target = network(K, aux=K * PARTS)
    for made in (target, *companions.values()):
        made.head = nn.Sequential(nn.Dropout(0.5), made.head)
    method, (x, y) = a_method(name, SingleLabel(K), companions, method={"subclasses": PARTS}), images()
    before, random = states(target, method.companions), torch.get_rng_state()
    found, again = (gradient_cosines(method, target, x, y, None) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random) and found and found == again
    assert all(torch.equal(a, b) for a, b in zip(before, states(target, method.companions), strict=True))
    assert all(p.grad is None for made in (target, method.companions) for p in made.parameters())


def test_with_the_fused_kernel(need):
    """Its losses remember what they were multiplied by in the last backward pass: steps are the same bits all the same."""
    need("triton")
    curves = []
    for every in (0, 1):
        torch.manual_seed(0)
        method, target, soft = sskt("triton")
        x, y = images()
        out = []
        for _ in range(2):
            if every:
                assert all(-1 <= v <= 1 for v in gradient_cosines(method, target, x, y, soft).values())
            found = method.step(target, x, y, soft)
            target.zero_grad()
            found["loss"].backward()
            with torch.no_grad():
                for p in target.parameters():
                    p -= 0.1 * p.grad
            out.append(found["loss"].item())
        curves.append((out, states(target)))
    assert curves[0][0] == curves[1][0]
    assert all(torch.equal(a, b) for a, b in zip(curves[0][1], curves[1][1], strict=True))


@pytest.mark.parametrize(("name", "names"), [("sskt", {"tiny"}), ("dml", {"peer1"}), ("maxl", {"subclasses"})])
def test_a_run_with_cosines_is_the_same_run(smoke, name, names):
    common = ("--data.size", "12", "--data.stored", "12", "--data.labelled", "48", "--data.batch", "16")
    common += ("--method.name", name, "--method.generator", "resnet20", "--run.log_every", "1", "--run.eval_every", "9")
    runs: list[tuple[list, dict]] = []
    for every in ("0", "1"):
        folder = fit(smoke(*common, "--run.cosine_every", every, "--name", every))
        lines = [{k: v for k, v in line.items() if re.search("loss|cosine", k)} for line in read_lines(folder, "step")]
        runs.append((lines, torch.load(Path(folder) / "checkpoints/last.pt", weights_only=True)))
    (plain, first), (measured, second) = runs
    assert [{k: v for k, v in line.items() if "cosine" not in k} for line in measured] == plain
    counts = [sum(k.startswith("cosine/") for k in line) for line in measured]
    assert counts == ([len(names)] * 3 + [0] * 3 * (name == "maxl")) * 2
    assert {k.removeprefix("cosine/") for line in measured for k in line if "cosine" in k} == names
    for part in ("target", "companions"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(v, second[part][k]) for k, v in first[part].items())
