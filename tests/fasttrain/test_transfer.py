"""Transfer modules run together are the plain ones: values, gradients, running statistics, and training."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fasttrain.transfer import TransferModule, run_together

CHANNELS = (6, 8, 12)
FORMS = [("shared", 1), ("shared", 8), ("grouped", 1), ("grouped", 8), ("grouped", 64)]
forms = pytest.mark.parametrize(("form", "pad_to"), FORMS)
PLAIN = {"form": "plain", "pad_to": 1, "recompute": False}


def modules_of(
    *classes: int, channels=CHANNELS, combine="sum", width=20, dtype=torch.float64, dims=2
) -> list[TransferModule]:
    """Modules whose batch norms are not as they begin: scales, shifts and statistics are random."""
    modules = [TransferModule(channels, width, c, combine, dims=dims) for c in classes]
    norms = [n for m in modules for n in m.modules() if isinstance(n, (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d))]
    assert len(norms) == 3 * len(channels) * len(classes)
    for norm in norms:
        torch.nn.init.normal_(norm.weight, 1, 0.3)
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return [m.to(dtype) for m in modules]


def taps_of(batch: int = 5, size: int = 13, dtype=torch.float64, dims=2) -> list[Tensor]:
    """Of images, or of clips with as many frames as fit: 4, 2 and 1."""
    sides = [size, size // 2 + 1, size // 4 + 1]
    frames = [(), (), ()] if dims == 2 else [(4,), (2,), (1,)]
    return [torch.randn(batch, c, *t, s, s, dtype=dtype) for c, t, s in zip(CHANNELS, frames, sides, strict=True)]


def everything(modules, taps, upstream_BC=None, run=run_together, **how) -> dict[str, Tensor]:
    """Logits, gradients of taps and parameters, and the modules' buffers after one step. The modules given stay as they are."""
    modules = copy.deepcopy(modules)
    taps = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in taps]
    out_BC = run(modules, taps, **how)
    upstream_BC = torch.linspace(-1, 1, out_BC.numel(), dtype=out_BC.dtype).view_as(out_BC)
    (out_BC * upstream_BC.sin()).sum().backward()
    found = {"logits": out_BC.detach()} | {f"tap {i}": t.grad for i, t in enumerate(taps)}
    for i, module in enumerate(modules):
        found |= {f"{i} gradient of {n}": p.grad for n, p in module.named_parameters()}
        found |= {f"{i} {n}": b for n, b in module.named_buffers()}
    return found


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any tensor, relative to its largest value. A convolution's bias before batch norm has a gradient of
    0 but for rounding, so its scale is the weight's."""
    assert found.keys() == expected.keys()
    out = 0.0
    for name, value in expected.items():
        if value.dtype == torch.int64:
            assert torch.equal(found[name], value), name
            continue
        scale = value.abs().max()
        if "gradient" in name and name.endswith(".bias"):
            scale = max(scale, expected[name.removesuffix("bias") + "weight"].abs().max())
        difference = ((found[name].to(value) - value).abs().max() / scale).item()
        assert math.isfinite(difference), name
        out = max(out, difference)
    return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dims", "classes"), [(2, (7,)), (2, (7, 3)), (2, (4, 9, 2)), (3, (7, 3))])
@forms
def test_equal_in_float64(form, pad_to, dims, classes, recompute, training):
    modules = [m.train(training) for m in modules_of(*classes, dims=dims)]
    taps = taps_of(size=13 if dims == 2 else 7, dims=dims)
    plain = everything(modules, taps, **PLAIN)
    assert plain["logits"].shape == (5, sum(classes))
    assert plain["0 branches.0.1.num_batches_tracked"] == training
    assert worst(everything(modules, taps, form=form, pad_to=pad_to, recompute=recompute), plain) <= 1e-12


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@forms
def test_equal_in_float32(form, pad_to, recompute, channels_last):
    """Values agree as closely as one can ask. Batch norm's backward pass subtracts what is nearly equal, so float32's gradients
    are some 1e-5 to 1e-3 away from float64's, the plain modules' as well: merged, they may not be further away."""
    modules, taps = modules_of(7, 3, combine="mean"), taps_of(16, 24)
    exact = everything(modules, taps, **PLAIN)
    modules, taps = [m.float() for m in modules], [t.float() for t in taps]
    if channels_last:
        modules = [m.to(memory_format=torch.channels_last) for m in modules]
        taps = [t.contiguous(memory_format=torch.channels_last) for t in taps]
    plain = everything(modules, taps, **PLAIN)
    found = everything(modules, taps, form=form, pad_to=pad_to, recompute=recompute)
    values = {k: v for k, v in plain.items() if "gradient" not in k and "tap" not in k}
    assert worst({k: found[k] for k in values}, values) < 1e-6
    assert worst(found, exact) < 1.5 * worst(plain, exact) + 1e-5


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_plain_is_each_module_by_itself(combine, dims):
    modules, taps = modules_of(7, 3, combine=combine, dims=dims), taps_of(size=9, dims=dims)

    def one_by_one(modules, taps):
        return torch.cat([m(taps, torch.empty(0)) for m in modules], dim=1)

    expected = everything(modules, taps, run=one_by_one)
    assert worst(everything(modules, taps, **PLAIN), expected) <= 0
    assert worst(everything(modules, taps, **PLAIN | {"recompute": True}), expected) <= 1e-12
    assert worst(everything(modules, taps, form="grouped", pad_to=8, recompute=False), expected) <= 1e-12


@forms
def test_equal_after_steps_with_momentum_and_weight_decay(form, pad_to):
    """Nothing of the padding is a parameter, so nothing of it can grow."""
    ends = []
    for how in (PLAIN, {"form": form, "pad_to": pad_to, "recompute": True}):
        torch.manual_seed(1)
        modules = torch.nn.ModuleList(modules_of(7, 3))
        optimiser = torch.optim.SGD(modules.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        for _ in range(6):
            optimiser.zero_grad()
            (run_together(modules, taps_of(), **how) - 1).square().mean().backward()
            optimiser.step()
        ends.append(modules.state_dict())
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.allclose(ends[1][name], value, rtol=1e-9, atol=1e-11), name
    assert ends[1]["0.branches.0.1.num_batches_tracked"] == 6


def test_running_statistics_stay_in_evaluation_and_move_without_gradients():
    modules, taps = modules_of(7, 3), taps_of()
    before = copy.deepcopy([m.state_dict() for m in modules])
    how = {"form": "grouped", "pad_to": 8, "recompute": True}
    with torch.no_grad():
        run_together([m.eval() for m in modules], taps, **how)
        assert all(
            torch.equal(m.state_dict()[n], v) for m, b in zip(modules, before, strict=True) for n, v in b.items()
        )
        run_together([m.train() for m in modules], taps, **how)
    expected = everything(modules_like(before), taps, **PLAIN)
    for i, module in enumerate(modules):
        for name, value in module.named_buffers():
            assert torch.allclose(value, expected[f"{i} {name}"], rtol=1e-12), name


def modules_like(states) -> list[TransferModule]:
    modules = modules_of(*(len(s["linear.bias"]) for s in states))
    for module, state in zip(modules, states, strict=True):
        module.load_state_dict(state)
    return modules


def kept(modules, taps, run=run_together, **how) -> int:
    """Bytes that autograd keeps for the backward pass, without the parameters and the taps."""
    known = {t.untyped_storage().data_ptr() for t in (*taps, *(p for m in modules for p in m.parameters()))}
    found: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no two share an address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out_BC = run(modules, taps, **how)  # noqa: F841, keeps the graph alive
    return sum(found.values())


@pytest.mark.parametrize("form", ["plain", "shared", "grouped"])
def test_recomputed_activations_are_not_kept(form):
    modules, taps = modules_of(7, 3), [t.requires_grad_() for t in taps_of(16, 32)]
    without, with_ = (kept(modules, taps, form=form, pad_to=1, recompute=r) for r in (False, True))
    activations = 0  # of one source: each layer's convolution and its ReLU
    for tap in taps:
        in_pixels, out_pixels = tap[0, 0].numel(), tap[0, 0, ::2, ::2].numel()
        activations += 8 * 16 * 2 * (10 * in_pixels + 10 * out_pixels + 20 * out_pixels)
    assert without > 2 * activations
    assert with_ < 0.01 * activations
    torch.compiler.reset()
    compiled = torch.compile(run_together, backend="aot_eager", fullgraph=True)
    assert kept(modules, taps, compiled, form=form, pad_to=1, recompute=True) < 0.01 * activations


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("form", "pad_to"), [("plain", 1), *FORMS])
def test_autocast(form, pad_to, recompute):
    modules, taps = modules_of(7, 3, dtype=torch.float32), taps_of(16, 24, torch.float32)
    plain = everything(modules, taps, **PLAIN)

    def under_autocast(modules, taps, **how):
        with torch.autocast("cpu", torch.bfloat16):
            out_BC = run_together(modules, taps, **how)
        assert out_BC.dtype == torch.bfloat16
        return out_BC.float()

    found = everything(modules, taps, run=under_autocast, form=form, pad_to=pad_to, recompute=recompute)
    assert all(v.isfinite().all() for v in found.values())
    values = {k: v for k, v in plain.items() if k == "logits" or "running" in k}
    assert worst({k: found[k] for k in values}, values) < 0.05


@pytest.mark.parametrize(
    ("form", "pad_to", "recompute", "dims"),
    [("shared", 8, True, 2), ("grouped", 8, False, 2), ("grouped", 8, True, 3)],
)
def test_compiled(form, pad_to, recompute, dims):
    """One graph, and the running statistics move once."""
    torch.compiler.reset()
    modules, taps = modules_of(7, 3, channels=CHANNELS[:2], dims=dims), taps_of(3, 9, dims=dims)[:2]
    compiled = torch.compile(run_together, backend="aot_eager", fullgraph=True)
    plain = everything(modules, taps, **PLAIN)
    assert worst(everything(modules, taps, run=compiled, form=form, pad_to=pad_to, recompute=recompute), plain) <= 1e-12
    evaluated = [m.eval() for m in modules]
    plain = everything(evaluated, taps, **PLAIN)
    assert (
        worst(everything(evaluated, taps, run=compiled, form=form, pad_to=pad_to, recompute=recompute), plain) <= 1e-12
    )


def test_meta_device_counts_operations():
    """PyTorch's counter takes the weights' gradient of a grouped convolution for that of a full one, here twice the work."""
    counts = {}
    for form, recompute in itertools.product(("plain", "shared", "grouped"), (False, True)):
        with torch.device("meta"):
            modules = [TransferModule(CHANNELS, 20, c) for c in (7, 3)]
            taps = [torch.empty(2, c, 8, 8, requires_grad=True) for c in CHANNELS]
        with FlopCounterMode(display=False) as forward:
            out_BC = run_together(modules, taps, form=form, pad_to=1, recompute=recompute)
        with FlopCounterMode(display=False) as backward:
            out_BC.sum().backward()
        assert out_BC.shape == (2, 10)
        counts[form, recompute] = (forward.get_total_flops(), backward.get_total_flops())
    once, twice = counts["plain", False]
    assert twice == 2 * once
    assert counts["shared", False] == (once, twice)
    weights = 2 * 2 * 4 * 4 * (9 * 10 * 10 + 10 * 20) * 2 * len(CHANNELS)  # of what is grouped
    assert counts["grouped", False] == (once, twice + weights)
    bottlenecks = once - 2 * 2 * 20 * 10
    for form in ("plain", "shared", "grouped"):
        without, again = counts[form, False], counts[form, True]
        assert again == (without[0], without[1] + bottlenecks)


def test_modules_must_be_alike():
    alike = modules_of(7, 3)
    for other in (modules_of(7, width=24)[0], TransferModule((6, 8, 13), 20, 7).double(), modules_of(7)[0].eval()):
        with pytest.raises(AssertionError, match="modules differ"):
            run_together([*alike, other], taps_of(), form="grouped", pad_to=1, recompute=False)
    for wrong in ({"pad_to": 0}, {"form": "wide"}):
        with pytest.raises(AssertionError):
            run_together(alike, taps_of(), **PLAIN | wrong)


def test_state_dicts_are_what_they_were():
    """The merged weights are made in passing: a checkpoint of one form is a checkpoint of any."""
    names = TransferModule(CHANNELS, 20, 7).state_dict()
    layers = [f"branches.{i}.{n}" for i, n in itertools.product(range(3), (0, 1, 3, 4, 6, 7))]
    assert {n.rpartition(".")[0] for n in names} == {*layers, "linear"}


def test_a_clip_of_one_frame_is_an_image():
    """3x3x3 kernels that see one frame, padded in time, are their middle planes; the rest is as with images."""
    (of_clips,), (of_images,) = modules_of(7, dims=3), modules_of(7)
    for (name, value), other in zip(of_images.named_parameters(), of_clips.parameters(), strict=True):
        assert other.dim() == value.dim() + (value.dim() == 4), name
        with torch.no_grad():
            other.copy_(value if value.dim() < 4 else torch.randn(other.shape, dtype=other.dtype))
            if value.dim() == 4:
                other[:, :, other.shape[2] // 2] = value
    of_clips.load_state_dict({k: v for k, v in of_images.state_dict().items() if "running" in k}, strict=False)
    taps, none = taps_of(), torch.empty(0)
    expected = of_images.eval()(taps, none)
    assert torch.allclose(of_clips.eval()([t.unsqueeze(2) for t in taps], none), expected, rtol=1e-12, atol=1e-12)
