"""The methods' losses and gradients against float64 implementations of their equations, written here from the papers.

Shape suffixes: B batch, K classes, S sub-classes of all classes.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fasttrain.kernels import Probabilities, SoftTargetLoss, TopK
from torch import Tensor, nn

from fasttrain.methods import METHODS, Maxl, Method, Setting
from fasttrain.methods.maxl import focal_loss, masked_softmax
from fasttrain.models import Backbone, Target, build_backbone
from fasttrain.recipe import _WITHOUT_SOURCES, Recipe, Source
from fasttrain.sources import SoftTargets
from fasttrain.tasks import MultiLabel, SingleLabel, Task
from fasttrain.transfer import LinearHead

B, K, PARTS, LR = 7, 3, 4, 0.3


class Smooth(Backbone):
    """Two convolutions with batch norm and tanh: differences of it have no kinks to fall over."""

    tap_channels = (6,)
    feature_dim = 6
    sections = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, 2, 1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)

    def forward(self, pixel_BCHW):
        x = torch.tanh(self.bn2(self.conv2(torch.tanh(self.bn1(self.conv1(pixel_BCHW))))))
        return [x], x


def says(w: dict[str, Tensor], x: Tensor, head: str = "head") -> Tensor:
    """What the same network says, from its equations: logits of one of its heads."""
    for i in (1, 2):
        x = F.conv2d(x, w[f"backbone.conv{i}.weight"], None, 2, 1)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        scale, shift = (w[f"backbone.bn{i}.{n}"][:, None, None] for n in ("weight", "bias"))
        x = torch.tanh((x - mean) / (var + 1e-5).sqrt() * scale + shift)
    return x.mean((2, 3)) @ w[f"{head}.weight"].T + w[f"{head}.bias"]


def network(classes: int, aux: int = 0) -> Target:
    made = Target(Smooth(), classes)
    for p in (made.backbone.bn1.weight, made.backbone.bn2.bias):
        nn.init.uniform_(p, 0.5, 1.5)
    if aux:
        made.aux_heads["subclasses"] = LinearHead(6, aux)
    return made.train()


def doubled(made: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in made.named_parameters()}


def a_method(name: str, task: Task, companions: dict[str, nn.Module] | None = None, **changes) -> Method:
    recipe = Recipe()
    recipe.method = replace(recipe.method, name=name, **changes.pop("method", {}))
    recipe.optim = replace(recipe.optim, **changes.pop("optim", {}))
    recipe.sources = [Source(n, "random", classes=K) for n in changes.pop("teachers", ())]
    losses = partial(SoftTargetLoss, implementation="reference", device="cpu")
    return METHODS[name](Setting(recipe, task, "cpu", torch.float32, losses, companions or {}))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(B, 3, 9, 9), torch.arange(B) % K


def several() -> Tensor:
    """Targets of a multi-label task, some not counted."""
    return torch.randint(-1, 2, (B, K)).float()


def item(value: Tensor) -> float:
    return value.detach().item()


def cross_entropy(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    return -logits_BK.softmax(1)[torch.arange(len(y_B)), y_B].log().mean()


def binary_cross_entropy(logits_BK: Tensor, y_BK: Tensor) -> Tensor:
    p_BK, y_BK = logits_BK.sigmoid(), y_BK.double()
    loss_BK = -(y_BK * p_BK.log() + (1 - y_BK) * (1 - p_BK).log())
    return loss_BK[y_BK >= 0].mean()


def kl(p_BK: Tensor, q_BK: Tensor) -> Tensor:
    return (p_BK * (p_BK.log() - q_BK.log())).sum(1).mean()


def kl_of_each(p_BK: Tensor, q_BK: Tensor) -> Tensor:
    return (p_BK * (p_BK / q_BK).log() + (1 - p_BK) * ((1 - p_BK) / (1 - q_BK)).log()).mean()


KINDS = {
    "one class": (SingleLabel, cross_entropy, kl, partial(torch.softmax, dim=1)),
    "several": (MultiLabel, binary_cross_entropy, kl_of_each, torch.sigmoid),
}


def same_gradients(made: nn.Module, oracle: dict[str, Tensor], loss: Tensor, rel: float = 1e-4) -> None:
    """The network's gradients are those of the float64 ``loss``, each to ``rel`` of its largest."""
    for (name, w), g in zip(
        oracle.items(),
        torch.autograd.grad(loss, list(oracle.values()), retain_graph=True, allow_unused=True),
        strict=True,
    ):
        mine, his = made.get_parameter(name).grad, torch.zeros_like(w) if g is None else g
        mine = torch.zeros_like(his) if mine is None else mine
        assert (mine - his).abs().max() <= rel * his.abs().max() + 1e-8, name


def test_the_methods_that_take_sources_are_those_the_recipe_knows():
    assert {name for name, kind in METHODS.items() if not kind.takes_sources} == set(_WITHOUT_SOURCES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("weight", "temperature", "teachers"), [(0.9, 4.0, 1), (0.3, 1.5, 2), (0.0, 4.0, 1), (1.0, 2.0, 2)]
)
def test_kd_is_its_equation(kind, weight, temperature, teachers):
    """(1 - w) L + w T^2 mean_m KL(t_m/T || s/T); no gradient to the teachers."""
    task_of, task_loss, divergence, probability = KINDS[kind]
    names = tuple("ab"[:teachers])
    method = a_method("kd", task_of(K), method={"weight": weight, "temperature": temperature}, teachers=names)
    target, (x, y) = network(K), images()
    y = several() if kind == "several" else y
    logits = [(3 * torch.randn(B, K)).requires_grad_() for _ in names]
    soft = SoftTargets(torch.cat(logits, dim=1), (K,) * teachers, names)
    found = method.step(target, x, y, soft)
    found["loss"].backward()
    w = doubled(target)
    s = says(w, x.double())
    follow = [
        temperature**2 * divergence(probability(t.double() / temperature), probability(s / temperature)) for t in logits
    ]
    loss = (1 - weight) * task_loss(s, y) + weight * sum(follow) / teachers
    assert item(found["loss"]) == pytest.approx(item(loss), rel=1e-5)
    assert item(found["primary"]) == pytest.approx(item(task_loss(s, y)), rel=1e-5)
    assert [item(found[f"aux/{n}"]) for n in names] == pytest.approx([item(v) for v in follow], rel=1e-4)
    same_gradients(target, w, loss)
    assert all(t.grad is None for t in logits)


def test_kd_with_recalled_teachers():
    """Kept as probabilities or as the two largest of them, the rest spread over the others: the distribution p^(1/T)."""
    (x, y), temperature = images(), 4.0
    p_BK = (2 * torch.randn(B, K)).double().softmax(1)
    top = p_BK.topk(2, dim=1)
    rest_BK = torch.full_like(p_BK, 0).scatter(1, top.indices, top.values)
    rest_BK = torch.where(rest_BK > 0, rest_BK, 1 - top.values.sum(1, keepdim=True))
    forms = [(Probabilities(p_BK.float()), p_BK), (TopK(top.values.float(), top.indices.short(), (2,)), rest_BK)]
    for form, kept_BK in forms:
        method = a_method("kd", SingleLabel(K), teachers=("t",))
        target = network(K)
        found = method.step(target, x, y, SoftTargets(form, (K,), ("t",)))
        found["loss"].backward()
        w = doubled(target)
        s = says(w, x.double())
        soft_BK = kept_BK ** (1 / temperature)
        soft_BK = soft_BK / soft_BK.sum(1, keepdim=True)
        loss = 0.1 * cross_entropy(s, y) + 0.9 * temperature**2 * kl(soft_BK, (s / temperature).softmax(1))
        assert item(found["loss"]) == pytest.approx(item(loss), rel=1e-5)
        same_gradients(target, w, loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peers", [1, 2])
def test_dml_is_its_equation(kind, peers):
    """Each network's gradient is that of its own loss alone, in which the others are constant."""
    task_of, task_loss, divergence, probability = KINDS[kind]
    networks = {"target": network(K)} | {f"peer{i + 1}": network(K) for i in range(peers)}
    method = a_method("dml", task_of(K), {n: made for n, made in networks.items() if n != "target"})
    x, y = images()
    y = several() if kind == "several" else y
    found = method.step(networks["target"], x, y, None)
    found["loss"].backward()
    weights = {name: doubled(made) for name, made in networks.items()}
    said = {name: says(w, x.double()) for name, w in weights.items()}
    losses = {}
    for name, s in said.items():
        follow = {n: divergence(probability(t.detach()), probability(s)) for n, t in said.items() if n != name}
        losses[name] = task_loss(s, y) + sum(follow.values()) / peers
        same_gradients(networks[name], weights[name], losses[name])
        label = "primary" if name == "target" else f"primary/{name}"
        assert item(found[label]) == pytest.approx(item(task_loss(s, y)), rel=1e-5)
        if name == "target":
            told = {n.removeprefix("aux/"): item(v) for n, v in found.items() if n.startswith("aux/")}
            assert told == pytest.approx({n: item(v) for n, v in follow.items()}, rel=1e-4)
    assert item(found["loss"]) == pytest.approx(item(sum(losses.values())), rel=1e-5)


def focal(logits_BC: Tensor, label_BC: Tensor) -> Tensor:
    p_BC = logits_BC.softmax(1)
    return -(label_BC * (1 - p_BC) ** 2 * p_BC.log()).sum(1).mean()


class Oracle:
    """MAXL in float64, from the paper's equations, of :class:`Smooth` networks."""

    def __init__(self, target: Target, generator: Target, x: Tensor, y_B: Tensor, backbone_lr: float = 1.0) -> None:
        self.theta, self.phi, self.x, self.y_B = doubled(target), doubled(generator), x.double(), y_B
        self.rate = {n: LR * (backbone_lr if n.startswith("backbone.") else 1) for n in self.theta}

    def label(self, phi: dict[str, Tensor]) -> Tensor:
        z_BS, out = says(phi, self.x), []
        for z_S, y in zip(z_BS, self.y_B, strict=True):
            e_S = z_S.exp() * (torch.arange(len(z_S)) // PARTS == y)
            out.append(e_S / e_S.sum())
        return torch.stack(out)

    def task(self, theta: dict[str, Tensor]) -> Tensor:
        return focal(says(theta, self.x), F.one_hot(self.y_B, K).double())

    def aux(self, theta: dict[str, Tensor], label_BS: Tensor) -> Tensor:
        return focal(says(theta, self.x, "aux_heads.subclasses.linear"), label_BS)

    def ahead(self, label_BS: Tensor, graph: bool = False) -> dict[str, Tensor]:
        loss = self.task(self.theta) + self.aux(self.theta, label_BS)
        grads = torch.autograd.grad(loss, list(self.theta.values()), create_graph=graph)
        return {n: p - self.rate[n] * g for (n, p), g in zip(self.theta.items(), grads, strict=True)}

    def entropy(self, label_BS: Tensor) -> Tensor:
        mean_S = label_BS.mean(0)
        return -(mean_S * mean_S.log()).sum()

    def outer(self, phi: dict[str, Tensor], graph: bool = False) -> Tensor:
        label_BS = self.label(phi)
        return self.task(self.ahead(label_BS, graph)) - 0.2 * self.entropy(label_BS)

    def first_order(self) -> list[Tensor]:
        """The authors' finite difference (as DARTS has it) and the entropy's gradient, by the generator's parameters."""
        phi = list(self.phi.values())
        ahead = {n: p.detach().requires_grad_() for n, p in self.ahead(self.label(self.phi)).items()}
        found = torch.autograd.grad(self.task(ahead), list(ahead.values()), allow_unused=True)
        d = [torch.zeros_like(p) if g is None else g for p, g in zip(ahead.values(), found, strict=True)]
        eps = 0.01 / torch.cat([g.flatten() for g in d]).norm()
        sides = []
        for sign in (1, -1):
            theta = {n: p.detach() + sign * eps * g for (n, p), g in zip(self.theta.items(), d, strict=True)}
            sides.append(torch.autograd.grad(self.aux(theta, self.label(self.phi)), phi))
        entropy = torch.autograd.grad(-0.2 * self.entropy(self.label(self.phi)), phi)
        return [-LR * (p - n) / (2 * eps) + e for p, n, e in zip(*sides, entropy, strict=True)]


def a_maxl(seed: int = 0, **changes) -> tuple[Maxl, Target, Target, Tensor, Tensor]:
    torch.manual_seed(seed)
    target, generator = network(K, aux=K * PARTS), network(K * PARTS)
    nn.init.normal_(generator.head.weight)
    changes["method"] = {"subclasses": PARTS} | changes.get("method", {})
    method = a_method("maxl", SingleLabel(K), {"generator": generator}, **changes)
    return method, target, generator, *images()


def test_maxl_trains_the_target_on_both_focal_losses():
    method, target, generator, x, y = a_maxl()
    before = {n: p.clone() for n, p in generator.named_parameters()}
    found = method.step(target, x, y, None)
    found["loss"].backward()
    oracle = Oracle(target, generator, x, y)
    label_BS = oracle.label(oracle.phi).detach()
    task, aux = oracle.task(oracle.theta), oracle.aux(oracle.theta, label_BS)
    assert item(found["loss"]) == pytest.approx(item(task + aux), rel=1e-5)
    assert item(found["primary"]) == pytest.approx(item(task), rel=1e-5)
    assert item(found["aux/subclasses"]) == pytest.approx(item(aux), rel=1e-5)
    same_gradients(target, oracle.theta, task + aux)
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in generator.named_parameters())


@pytest.mark.parametrize("backbone_lr", [1.0, 0.1])
def test_maxl_second_order_is_the_gradient_through_the_step(backbone_lr):
    """Against float64 differentiated twice, and that against central differences of the generator's loss."""
    method, target, generator, x, y = a_maxl(optim={"backbone_lr": backbone_lr})
    oracle = Oracle(target, generator, x, y, backbone_lr)
    found = method.other_step(1, target, x, y, LR)
    found["loss"].backward(inputs=list(generator.parameters()))
    loss = oracle.outer(oracle.phi, graph=True)
    assert item(found["loss"]) == pytest.approx(item(loss), rel=1e-5)
    same_gradients(generator, oracle.phi, loss, rel=1e-3)
    grads = torch.autograd.grad(loss, list(oracle.phi.values()))
    for _ in range(4):
        way = {n: torch.randn_like(p) for n, p in oracle.phi.items()}
        h = 2e-6
        up, down = (
            oracle.outer({n: (p + sign * h * way[n]).detach() for n, p in oracle.phi.items()}) for sign in (1, -1)
        )
        along = sum((g * w).sum() for g, w in zip(grads, way.values(), strict=True))
        assert item((up - down) / (2 * h)) == pytest.approx(item(along), rel=1e-6, abs=1e-8)


def test_maxl_first_order_is_the_authors_difference_and_near_the_second():
    for seed in range(3):
        method, target, generator, x, y = a_maxl(seed, method={"order": "first"})
        oracle = Oracle(target, generator, x, y)
        method.other_step(1, target, x, y, LR)["loss"].backward(inputs=list(generator.parameters()))
        exact = torch.autograd.grad(oracle.outer(oracle.phi, graph=True), list(oracle.phi.values()))
        mine = torch.cat([p.grad.double().flatten() for p in generator.parameters()])
        his, second = (torch.cat([g.flatten() for g in gs]) for gs in (oracle.first_order(), exact))
        assert (mine - his).norm() < 1e-3 * his.norm()
        assert (mine - second).norm() < 1e-2 * second.norm()


def test_maxl_second_order_through_a_real_network():
    """ResNet-20 with its ReLUs and shortcuts, part of it frozen: PyTorch's own gradient of a gradient, in float32."""
    torch.manual_seed(1)
    target, generator = (Target(build_backbone("resnet20"), n).channels_last().train() for n in (K, K * PARTS))
    target.aux_heads["subclasses"] = LinearHead(64, K * PARTS)
    target.backbone.freeze(2)
    method = a_method("maxl", SingleLabel(K), {"generator": generator}, method={"subclasses": PARTS, "entropy": 0.0})
    x, y = torch.randn(B, 3, 12, 12).contiguous(memory_format=torch.channels_last), images()[1]
    state = {n: b.clone() for n, b in target.state_dict().items()}
    method.other_step(1, target, x, y, LR)["loss"].backward(inputs=list(generator.parameters()))
    assert all(torch.equal(state[n], b) for n, b in target.state_dict().items())
    theta = {n: p for n, p in target.named_parameters() if p.requires_grad}
    label_BS = masked_softmax(generator(x).logits_BK, y, K)
    out = target(x, aux=True)
    loss = focal_loss(out.logits_BK, F.one_hot(y, K)) + focal_loss(out.aux_logits_BC, label_BS)
    grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    ahead = {n: p - LR * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    primary = focal_loss(torch.func.functional_call(target, ahead, (x,)).logits_BK, F.one_hot(y, K))
    for p, g in zip(generator.parameters(), torch.autograd.grad(primary, list(generator.parameters())), strict=True):
        assert (p.grad - g).norm() < 1e-3 * g.norm() + 1e-7


class Dropping(Smooth):
    """With dropout in the middle, as timm's networks may have it."""

    def forward(self, pixel_BCHW):
        x = F.dropout(torch.tanh(self.bn1(self.conv1(pixel_BCHW))), 0.5, self.training)
        x = torch.tanh(self.bn2(self.conv2(x)))
        return [x], x


def test_maxl_differentiates_the_step_that_was_taken_where_networks_drop():
    """Each pass through the target drops the same in one step, and something else in the next."""
    grads = {}
    for order in ("second", "first", "by PyTorch"):
        method, target, generator, x, y = a_maxl(method={"order": order, "entropy": 0.0})
        target.backbone.__class__ = Dropping
        torch.manual_seed(3)
        if order == "by PyTorch":
            label_BS = method.labels(x, y)
            theta, out = dict(target.named_parameters()), target(x, aux=True)
            loss = focal_loss(out.logits_BK, F.one_hot(y, K)) + focal_loss(out.aux_logits_BC, label_BS)
            steps = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            ahead = {n: p - LR * g for (n, p), g in zip(theta.items(), steps, strict=True)}
            focal_loss(torch.func.functional_call(target, ahead, (x,)).logits_BK, F.one_hot(y, K)).backward()
        else:
            found = [method.other_step(1, target, x, y, LR) for _ in range(2)]
            assert found[0]["primary"] != found[1]["primary"]
            found[0]["loss"].backward()
        grads[order] = torch.cat([p.grad.flatten() for p in generator.parameters()])
    exact = grads["by PyTorch"]
    assert (grads["second"] - exact).norm() < 1e-3 * exact.norm()
    assert (grads["first"] - exact).norm() < 3e-2 * exact.norm()


@pytest.mark.parametrize("order", ["second", "first"])
def test_maxl_looks_ahead_without_a_trace(order):
    """In the target: weights, running statistics, gradients; nor does the label see more than the batch."""
    method, target, generator, x, y = a_maxl(method={"order": order})
    state, weights = ({n: b.clone() for n, b in made.state_dict().items()} for made in (target, generator))
    found = method.other_step(1, target, x, y, LR)
    found["loss"].backward()  # even where nobody says by what to differentiate
    assert all(torch.equal(state[n], b) for n, b in target.state_dict().items())
    assert all(p.grad is None for p in target.parameters())
    assert all(torch.equal(weights[n], p) for n, p in generator.named_parameters())
    assert all(p.grad is not None for p in generator.parameters())


def test_maxl_orders_agree_in_bfloat16():
    """The finite difference is too small for bfloat16, so it is not computed in it."""
    for order in ("second", "first"):
        grads = []
        for dtype in (torch.float32, torch.bfloat16):
            method, target, generator, x, y = a_maxl(method={"order": order, "entropy": 0.0})
            method.setting = replace(method.setting, dtype=dtype)
            method.other_step(1, target, x, y, LR)["loss"].backward()
            grads.append(torch.cat([p.grad.flatten() for p in generator.parameters()]))
        assert torch.cosine_similarity(*grads, dim=0) > 0.99, order


def test_masked_softmax():
    logits_BS, y = 5 * torch.randn(B, K * PARTS), torch.arange(B) % K
    label_BS = masked_softmax(logits_BS, y, K)
    for row_S, z_S, k in zip(label_BS, logits_BS, y, strict=True):
        own = slice(int(k) * PARTS, int(k + 1) * PARTS)
        assert torch.allclose(row_S[own], z_S[own].softmax(0))
        assert row_S[own].sum() == pytest.approx(1, abs=1e-6)
        assert float(row_S.sum() - row_S[own].sum()) == pytest.approx(0, abs=1e-6)
        assert (torch.cat([row_S[: own.start], row_S[own.stop :]]) == 0).all()
    assert masked_softmax(logits_BS.bfloat16() * 1e4, y, K).isfinite().all()


def test_maxl_entropy_keeps_sub_classes_in_use():
    """A generator that learns from the entropy term alone spreads each class over its sub-classes."""
    method, target, generator, x, y = a_maxl(method={"entropy": 5.0})
    assert method.optim(1).lr == 1e-3 and method.optim(1).momentum == 0 and method.optim(0).momentum == 0.9

    def entropy() -> float:
        mean_S = method.labels(x, y).mean(0)
        return -item((mean_S * mean_S.log()).sum())

    before = entropy()
    for _ in range(10):
        generator.zero_grad()
        method.other_step(1, target, x, y, 0.0)["loss"].backward()  # with lr 0 the labels change nothing in the target
        with torch.no_grad():
            for p in generator.parameters():
                p -= 0.02 * p.grad
    assert entropy() > before + 0.05


@pytest.mark.parametrize("name", ["scratch", "kd", "dml", "maxl"])
def test_a_step_compiles_in_one_piece(name):
    companions = {"dml": {"peer1": network(K)}, "maxl": {"generator": network(K * PARTS)}}.get(name, {})
    method = a_method(name, SingleLabel(K), companions, teachers=("t",), method={"subclasses": PARTS})
    target, (x, y) = network(K, aux=K * PARTS), images()
    soft = SoftTargets(torch.randn(B, K), (K,), ("t",)) if name == "kd" else None
    plain = method.step(target, x, y, soft)
    compiled = torch.compile(method.step, backend="eager", fullgraph=True)(target, x, y, soft)
    assert {n: item(v) for n, v in compiled.items()} == pytest.approx({n: item(v) for n, v in plain.items()}, rel=1e-5)
