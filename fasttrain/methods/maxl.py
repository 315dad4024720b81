"""Meta-auxiliary learning: a second network learns to part each class into sub-classes that help the target's task.

Shape suffixes: B batch, K classes, S all sub-classes (K times ``method.subclasses``), C either.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fasttrain.models import Target
from fasttrain.recipe import Optim, Recipe
from fasttrain.sources import SoftTargets
from fasttrain.tasks import MultiLabel, Task

from .base import Method, Setting, companion

_HEAD = "subclasses"
_NO_FP16 = "run.precision: fp16 cannot hold maxl's gradients through a step; take bf16 or fp32"


class Maxl(Method):
    """Liu, Davison and Johns 2019, "Self-supervised generalisation with meta auxiliary learning".

    Every epoch has two passes. In the first, the target is trained on ``L_task + L_aux``: both are focal losses
    (:func:`focal_loss`), L_aux of its auxiliary head against the generator's sub-class labels. In the second, the generator
    is trained on ``L_task(theta+) + entropy * sum_s p_s log p_s``, where ``theta+ = theta - lr * grad(L_task + L_aux)`` is the
    target after a plain step of gradient descent, without momentum, and p is the batch's mean label.

    The labels act on L_task(theta+) through that step alone, and L_aux is linear in them: ``L_aux = mean_b sum_s label_bs *
    cost_bs(theta)``. With ``d = grad L_task(theta+)``, the derivative of L_task(theta+) by ``label_bs / B`` is therefore ``-lr``
    times that of cost_bs along d at theta. ``order: second`` computes it exactly, in one forward pass that carries
    derivatives along (no graph of a gradient is kept: the authors' code differentiates the step itself, for the same numbers).
    ``order: first`` takes the difference of cost at ``theta + e d`` and ``theta - e d``, ``e = 0.01 / |d|``, over ``2 e``, as the
    authors' faster version does (which leaves out the entropy). It is computed in float32, since the difference is small.

    Both networks normalise by the batch in both passes, as the authors' do. The second pass leaves no trace in the target,
    neither in its weights nor in its batch norms' running statistics (the authors' moves these). The generator's move in
    both passes, and nothing reads them: it is never evaluated.
    """

    passes = ("target", "generator")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if setting.dtype == torch.float16:  # with precision auto, too
            raise ValueError(_NO_FP16)
        self.method, self.optim_spec = setting.recipe.method, setting.recipe.optim
        self.generator = self.companions["generator"]
        if self.method.order == "second":
            _load_forward_derivatives()

    @classmethod
    def check(cls, recipe: Recipe, task: Task) -> None:
        if isinstance(task, MultiLabel):
            raise ValueError("method.name: maxl parts single classes into sub-classes; a multi-label task has none")
        if recipe.method.subclasses < 2:
            raise ValueError(
                f"method.subclasses: {recipe.method.subclasses}, but maxl needs at least 2 sub-classes of each class"
            )
        if recipe.run.accumulate > 1:
            raise ValueError(f"run.accumulate: {recipe.run.accumulate}, but maxl takes whole batches")
        if recipe.optim.label_smoothing:
            raise ValueError(
                f"optim.label_smoothing: {recipe.optim.label_smoothing}, but maxl's focal loss is of plain labels; set it to 0"
            )
        if recipe.run.precision == "fp16":
            raise ValueError(_NO_FP16)

    @classmethod
    def heads(cls, recipe: Recipe, classes: int) -> dict[str, int]:
        return {_HEAD: classes * recipe.method.subclasses}

    @classmethod
    def networks(cls, recipe: Recipe, classes: int) -> dict[str, nn.Module]:
        method = recipe.method
        count = classes * method.subclasses
        return {"generator": companion(recipe, field="method.generator", model=method.generator, classes=count)}

    def trained(self, target: Target, number: int) -> list[nn.Module]:
        return [self.generator] if number else [target]

    def optim(self, number: int) -> Optim:
        optim, method = self.optim_spec, self.method
        if not number:
            return optim
        plain = {"momentum": 0.0, "nesterov": False, "dampening": 0.0, "backbone_lr": 1.0}
        return replace(optim, lr=method.generator_lr, weight_decay=method.generator_weight_decay, **plain)  # type: ignore[arg-type]

    def step(self, target: Target, x: Tensor, targets: Tensor, soft: SoftTargets | None) -> dict[str, Tensor]:
        with torch.no_grad():
            label_BS = self.labels(x, targets)
        output = self.ask(target, x, aux=True)
        assert output.aux_logits_BC is not None
        primary = focal_loss(output.logits_BK, one_hot(targets, self.task.classes))
        aux = focal_loss(output.aux_logits_BC, label_BS)
        return {"loss": primary + aux, "primary": primary, f"aux/{_HEAD}": aux}

    def other_step(self, number: int, target: Target, x: Tensor, targets: Tensor, lr: float) -> dict[str, Tensor]:
        label_BS = self.labels(x, targets)
        draws = _Draws(x.device)
        primary, way = self._look_ahead(target, x, targets, label_BS.detach(), lr)
        if self.method.order == "second":
            with draws.again():
                change_BS = self._exact_change(target, x, way)
        else:
            change_BS = self._measured_change(target, x, way, draws)
        by_label = (label_BS * change_BS).sum(1).mean()
        mean_S = label_BS.mean(0)
        entropy = (mean_S * mean_S.clamp_min(1e-20).log()).sum()
        loss = primary + (by_label - by_label.detach()) + self.method.entropy * entropy
        return {"loss": loss, "primary": primary, "negative_entropy": entropy}

    def labels(self, x: Tensor, targets_B: Tensor) -> Tensor:
        """The generator's labels [B, S], float32: a softmax over the sub-classes of each sample's own class."""
        return masked_softmax(self.ask(self.generator, x).logits_BK, targets_B, self.task.classes)

    def _look_ahead(
        self, target: Target, x: Tensor, targets_B: Tensor, label_BS: Tensor, lr: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The task's loss after the step, and what one more step, for that loss alone, would add to each parameter."""
        theta = {name: p.detach().requires_grad_() for name, p in target.named_parameters() if p.requires_grad}
        rate = {name: lr * self._factor(name) for name in theta}
        label_BK = one_hot(targets_B, self.task.classes)
        output = self.ask_with(target, theta | _buffers(target), x, aux=True)
        assert output.aux_logits_BC is not None
        loss = focal_loss(output.logits_BK, label_BK) + focal_loss(output.aux_logits_BC, label_BS)
        ahead = {name: theta[name] + step for name, step in _descent(loss, theta, rate).items()}
        ahead = {name: p.requires_grad_() for name, p in ahead.items()}
        primary = focal_loss(self.ask_with(target, ahead | _buffers(target), x).logits_BK, label_BK)
        return primary.detach(), _descent(primary, ahead, rate)

    def _factor(self, name: str) -> float:
        """Of a parameter's learning rate."""
        return self.optim_spec.backbone_lr if name.startswith("backbone.") else 1.0

    @torch.no_grad()
    def _exact_change(self, target: Target, x: Tensor, way: dict[str, Tensor]) -> Tensor:
        """Derivative of the auxiliary head's :func:`focal_cost` along ``way``: float32 [B, S]."""
        with forward_ad.dual_level():
            moving = {name: forward_ad.make_dual(target.get_parameter(name), w) for name, w in way.items()}
            logits_BS = self.ask_with(target, moving | _buffers(target), x, aux=True).aux_logits_BC
            assert logits_BS is not None
            change_BS = forward_ad.unpack_dual(focal_cost(logits_BS)).tangent
        assert change_BS is not None
        return change_BS

    @torch.no_grad()
    def _measured_change(self, target: Target, x: Tensor, way: dict[str, Tensor], draws: "_Draws") -> Tensor:
        """The same by a central difference, over a length of 0.02 in the parameters."""
        share = 0.01 / torch.stack([w.norm() for w in way.values()]).norm().clamp_min(1e-12)
        sides = []
        for sign in (1, -1):
            moved = {name: target.get_parameter(name) + sign * share * w for name, w in way.items()}
            with _all_of_float32(), draws.again():
                output = torch.func.functional_call(target, moved | _buffers(target), (x,), {"aux": True})
            sides.append(focal_cost(output.aux_logits_BC))
        return (sides[0] - sides[1]) / (2 * share)


def masked_softmax(logits_BS: Tensor, targets_B: Tensor, classes: int) -> Tensor:
    """Softmax over the sub-classes of each sample's class, 0 for all others: [B, S] float32; S is a multiple of ``classes``.

    (The authors' code gives the others a weight of 1e-8 before normalising.)
    """
    of_class_S = torch.arange(logits_BS.shape[1], device=logits_BS.device) // (logits_BS.shape[1] // classes)
    own_BS = of_class_S == targets_B[:, None]
    return logits_BS.float().masked_fill(~own_BS, float("-inf")).softmax(1)


def focal_loss(logits_BC: Tensor, label_BC: Tensor) -> Tensor:
    """``sum_c label_c * cost_c`` (:func:`focal_cost`), batch mean, float32."""
    return (label_BC * focal_cost(logits_BC)).sum(1).mean()


def focal_cost(logits_BC: Tensor) -> Tensor:
    """``-(1 - p_c)^2 * log p_c`` with p the softmax: float32 [B, C] (Lin et al. 2017, gamma 2)."""
    log_p_BC = logits_BC.float().log_softmax(1)
    return -(1 - log_p_BC.exp()).square() * log_p_BC


def one_hot(targets_B: Tensor, classes: int) -> Tensor:
    """float32 [B, K]."""
    return torch.nn.functional.one_hot(targets_B, classes).float()


def _descent(loss: Tensor, theta: dict[str, Tensor], rate: dict[str, float]) -> dict[str, Tensor]:
    """What a step of gradient descent adds to each parameter; 0 where the loss does not depend on it."""
    found = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else -rate[name] * g
        for (name, p), g in zip(theta.items(), found, strict=True)
    }


class _Draws:
    """The random numbers that come next on a device, to be drawn once more: dropout then drops the same."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._cpu, self._cuda = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self._devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """In the block they are drawn from the first; after it the random state is what it was before."""
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _load_forward_derivatives() -> None:
    """PyTorch does so at their first use, with a warning of its own about ``torch.jit.script``."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


@contextmanager
def _all_of_float32() -> Iterator[None]:
    """Without the 10 bits of TF32, to which cuDNN rounds float32: parameters may move by less than these show."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _buffers(target: Target) -> dict[str, Tensor]:
    """Copies, which batch norms may write to."""
    return {name: b.clone() for name, b in target.named_buffers()}
