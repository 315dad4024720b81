"""Backbones that start from weights: every layout of files, what is refused, and what of a target is trained."""

import copy
import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fasttrain.loaders import urls
from torch import Tensor, nn

from fasttrain import checkpoint
from fasttrain.build import build_target
from fasttrain.models import BACKBONES, Target, build_backbone, load_backbone
from fasttrain.optim import build_optimiser
from fasttrain.recipe import Optim, Recipe, Transfer
from fasttrain.recipe import Target as TargetFields

from .test_command_line import nothing_written, refused

NARROW = {"shortcut": "B", "width": 0.125}


def other_weights(model: str = "resnet3d18", seed: int = 7, **fields) -> dict[str, Tensor]:
    """A backbone's state dict with nothing as it begins."""
    torch.manual_seed(seed)
    state = build_backbone(model, **(NARROW | fields if "3d" in model and model[0] == "r" else {})).state_dict()
    return {k: torch.rand_like(v) + 0.5 if v.is_floating_point() else v + 3 for k, v in state.items()}


def holds(backbone: nn.Module, state: dict[str, Tensor]) -> bool:
    """But for the batch counters, which not every file has."""
    found = {k: v for k, v in backbone.state_dict().items() if not k.endswith("num_batches_tracked")}
    return bool(found) and all(torch.equal(v, state[k]) for k, v in found.items())


def fc(classes: int, features: int = 64) -> dict[str, Tensor]:
    return {"fc.weight": torch.randn(classes, features), "fc.bias": torch.randn(classes)}


def old_layout(path: Path, state: dict[str, Tensor], prefix: str = "module.") -> Path:
    """As ``resnet-18-kinetics.pth``: written by PyTorch 0.3 from a DataParallel network, without batch counters."""
    kept = {k: v for k, v in (state | fc(400)).items() if not k.endswith("num_batches_tracked")}
    optimiser = torch.optim.SGD([nn.Parameter(v.clone()) for v in kept.values()], lr=0.1, momentum=0.9)
    content = {"arch": "resnet-18", "epoch": 88, "optimizer": optimiser.state_dict()}
    content["state_dict"] = {f"{prefix}{k}": v for k, v in kept.items()}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def new_layout(path: Path, state: dict[str, Tensor]) -> Path:
    """As ``r3d18_K_200ep.pth``."""
    torch.save({"epoch": 200, "arch": "resnet-18", "state_dict": state | fc(700)}, path)
    return path


def bare(path: Path, state: dict[str, Tensor]) -> Path:
    """As torchvision's."""
    torch.save(state | fc(400), path)
    return path


def ours(path: Path, state: dict[str, Tensor]) -> Path:
    """As a run's ``checkpoints/selected.pt``."""
    target = {f"backbone.{k}": v for k, v in state.items()} | {
        "head.weight": torch.zeros(5, 64),
        "head.bias": torch.zeros(5),
    }
    target |= {"aux_heads.places.linear.weight": torch.zeros(7, 64)}
    checkpoint.save(
        path, {"target": target, "classes": list("abcde"), "epoch": 3, "recipe": {"name": "run"}, "val": {}}
    )
    return path


LAYOUTS = {
    "old": old_layout,
    "old, twice in a DataParallel": lambda path, state: old_layout(path, state, "module.module."),
    "new": new_layout,
    "bare": bare,
    "ours": ours,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_fits(layout, tmp_path):
    state = other_weights()
    path = LAYOUTS[layout](tmp_path / "weights.pth", state)
    backbone = build_backbone("resnet3d18", **NARROW)
    assert not holds(backbone, state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_backbone(backbone, str(path), digest[:12].upper()).endswith(f"SHA-256 {digest}")
    assert holds(backbone, state)
    counted = backbone.state_dict()["bn1.num_batches_tracked"]
    assert counted == (0 if layout.startswith("old") else 3)


@pytest.mark.parametrize(("model", "fields"), [("resnet20", {}), ("resnet3d50", {}), ("resnet3d18", {"shortcut": "A"})])
def test_other_backbones(model, fields, tmp_path):
    state = other_weights(model, **fields)
    backbone = build_backbone(model, **(NARROW | fields if model != "resnet20" else {}))
    load_backbone(backbone, str(ours(tmp_path / "selected.pt", state)))
    assert holds(backbone, state)


def test_a_package(tmp_path, monkeypatch):
    package = tmp_path / "kinetics_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    state = other_weights()
    new_layout(package / "r3d18.pth", state)
    monkeypatch.syspath_prepend(tmp_path)
    backbone = build_backbone("resnet3d18", **NARROW)
    assert "package:kinetics_weights" in load_backbone(backbone, "package:kinetics_weights")
    assert holds(backbone, state) and "kinetics_weights" not in sys.modules  # found, and nothing of it was run


def test_torchvisions_names(tmp_path, monkeypatch):
    """The file is looked for where torchvision keeps it; it is torchvision's own, with a classifier."""
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with torch.device("meta"):
        empty = torchvision.models.video.mc3_18()
    state = {k: torch.randn(v.shape) for k, v in empty.state_dict().items()}
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub/checkpoints/mc3_18-a90a0ba3.pth")
    backbone = build_backbone("mc3_18")
    told = load_backbone(backbone, "KINETICS400_V1")
    assert told.startswith("KINETICS400_V1 (") and holds(backbone, state)


def test_a_librarys_names_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urls, "WAITS", ())
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    for name, value in nowhere.items():
        monkeypatch.setenv(name, value)
    here = "torchvision's weights KINETICS400_V1 of r3d_18 are not on this machine, .* begins with b3b3357e"
    for model, name, sha256, message in (
        ("r3d_18", "KINETICS400_V1", "", here),
        (
            "r3d_18",
            "KINETICS400_V1",
            "1" * 64,
            r"cannot read https://download\.pytorch\.org/models/r3d_18-b3b3357e\.pth",
        ),
        (
            "r3d_18",
            "KINETICS400_V1",
            "b3b3357e",
            r"cannot read https://download\.pytorch\.org/models/r3d_18-b3b3357e\.pth",
        ),
        ("r3d_18", "KINETICS_V9", "", "torchvision has no weights 'KINETICS_V9' for r3d_18, but KINETICS400_V1"),
        ("resnet20", "DEFAULT", "", "'DEFAULT' is a name of torchvision's, which has no resnet20; give a file"),
    ):
        with pytest.raises(ValueError, match=rf"target\.weights( or target\.sha256)?: {message}"):
            load_backbone(build_backbone(model), name, sha256)


class _Trap:
    def __reduce__(self):
        return (print, ("code in the weights ran",))


def test_files_that_are_refused(tmp_path, capfd):
    """Nothing of them is loaded, not even a part."""
    backbone = build_backbone("resnet3d18", **NARROW)
    before = copy.deepcopy(backbone.state_dict())
    state = other_weights()

    def fails(message: str, content: dict | None = None, into: nn.Module = backbone, sha256: str = "", **how) -> None:
        path = tmp_path / "given.pth"
        path.unlink(missing_ok=True)
        if content is not None:
            torch.save(content, path, **how)
        with pytest.raises(ValueError, match=message):
            load_backbone(into, str(path), sha256)

    of_a, short = other_weights(shortcut="A"), {k: v for k, v in state.items() if not k.startswith("layer3.1.bn2")}
    stem = state | {"conv1.weight": torch.zeros(8, 3, 3, 7, 7)}
    into_a = build_backbone("resnet3d18", shortcut="A", width=0.125)
    fails(r"target\.weights: there is no weights file .*given\.pth")
    fails(r"target\.weights: the weights .* hold code \(.*print\) and were not loaded", {"state_dict": _Trap()})
    fails(
        r"target\.weights: the weights .* (hold code|are no checkpoint)",
        {"state_dict": _Trap()},
        _use_new_zipfile_serialization=False,
    )
    fails(r"target\.weights: the weights .* hold no tensors by name", {"epoch": 3})
    fails(
        r"target\.weights or target\.sha256: the weights .* have the SHA-256 .*, not 1234: they are",
        state,
        sha256="1234",
    )
    fails(
        r"given\.pth does not fit target\.model: resnet3d18; 4 tensors are missing: layer3\.1\.bn2\.weight, "
        r"layer3\.1\.bn2\.bias, layer3\.1\.bn2\.running_mean, \.\.$",
        short,
    )
    fails(r"; 1 tensors are left over: layer9\.bn\.weight$", state | {"layer9.bn.weight": torch.zeros(3)})
    fails(r"1 tensors are of another shape: conv1\.weight \[8, 3, 3, 7, 7\], not \[8, 3, 7, 7, 7\]$", stem)
    fails(r"of another shape: conv1\.weight \[64, 3, 7, 7, 7\], not \[8, ", other_weights(width=1.0))
    fails(r"\d+ tensors are left over: layer1\.2\.conv1\.weight, ", other_weights("resnet3d34"))
    fails(
        r"\d+ tensors are missing: layer2\.0\.downsample.* \(it has no weights of shortcuts: target\.shortcut A\?\)",
        of_a,
    )
    fails(
        r"are left over: layer2\.0\.downsample.* \(it has weights of shortcuts: target\.shortcut B\?\)", state, into_a
    )
    assert "ran" not in capfd.readouterr().out
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def target_of(sources: dict[str, int] | None = None, module: bool = True, **fields) -> Target:
    torch.manual_seed(0)
    recipe = Recipe(target=TargetFields(model="resnet3d18", **(NARROW | fields)), transfer=Transfer(module=module))
    return build_target(recipe, 5, {"one": 7} if sources is None else sources)


def test_a_target_that_starts_from_weights(tmp_path):
    """Heads start from the numbers that they would have had without, whatever the sources."""
    state = other_weights()
    path = str(new_layout(tmp_path / "weights.pth", state))
    without, target = target_of(), target_of(weights=path)
    assert holds(target.backbone, state) and not holds(without.backbone, state)
    for name in ("head", "aux_heads"):
        for a, b in zip(getattr(target, name).parameters(), getattr(without, name).parameters(), strict=True):
            assert torch.equal(a, b)
    assert without.origin == "random" and path in target.origin and "SHA-256" in target.origin
    recipe = Recipe(target=TargetFields(model="resnet3d18", weights="nowhere.pth", **NARROW))
    assert build_target(recipe, 5, {}, weights=False).origin == "random"


def steps(target: Target, optimiser: torch.optim.Optimizer, count: int = 2) -> None:
    target.train()
    for _ in range(count):
        out = target(torch.randn(3, 3, 4, 32, 32), aux=True)
        (out.logits_BK.square().mean() + out.aux_logits_BC.square().mean()).backward()
        optimiser.step()
        optimiser.zero_grad()


SECTIONS = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]


@pytest.mark.parametrize("frozen", [0, 1, 3, 5])
def test_frozen_sections_do_not_move(frozen):
    """Neither their parameters nor their statistics; everything else does."""
    target = target_of(frozen=frozen)
    before = copy.deepcopy(target.state_dict())
    optimiser = build_optimiser(Optim(lr=0.1, weight_decay=0.1), target)
    steps(target.eval(), optimiser)
    still = tuple(f"backbone.{name}." for names in SECTIONS[:frozen] for name in names)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(still), name
    trained = [p for p in target.parameters() if p.requires_grad]
    assert [p for g in optimiser.param_groups for p in g["params"]] == trained
    assert target.backbone.layer4[0].bn1.training == (frozen < 5) and target.aux_heads["one"].branches[0][1].training
    assert not any(m.training for m in target.eval().modules())


def test_a_frozen_copy_stays_frozen():
    """The moving average's, for one."""
    target = copy.deepcopy(target_of(frozen=2)).train()
    assert not target.backbone.layer1[0].bn1.training and target.backbone.layer2[0].bn1.training


def test_sections_hold_every_tensor():
    with torch.device("meta"):
        for name in BACKBONES:
            backbone = build_backbone(name)
            parts = [backbone.get_submodule(part) for names in backbone.sections for part in names]
            held = [id(p) for part in parts for p in part.parameters()]
            assert held == [id(p) for p in backbone.parameters()], name
            backbone.freeze(len(backbone.sections))
            assert not any(p.requires_grad for p in backbone.parameters())


def test_too_many_frozen():
    for frozen in (6, -1):
        with pytest.raises(ValueError, match=rf"target\.frozen: {frozen}, but resnet3d18 has 5 sections .*: 0 \.\. 5"):
            target_of(frozen=frozen)


def moved(before: Target, after: Target, part: str) -> list[Tensor]:
    pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
    return [b.detach() - a.detach() for a, b in pairs]


@pytest.mark.parametrize("factor", [0.1, 0.0])
def test_the_backbone_learns_at_its_own_rate(factor):
    """One step: the heads' is the same, the backbone's is the factor of it."""
    spec = Optim(lr=0.5)
    whole, part = target_of(), target_of()
    start = copy.deepcopy(whole)
    for target, fields in ((whole, {}), (part, {"backbone_lr": factor})):
        torch.manual_seed(1)
        steps(target, build_optimiser(replace(spec, **fields), target), 1)
    for full, scaled in zip(moved(start, whole, "backbone"), moved(start, part, "backbone"), strict=True):
        assert full.abs().max() > 0
        assert torch.allclose(scaled, factor * full, atol=2e-7, rtol=1e-3)
    for name in ("head", "aux_heads"):
        assert all(torch.equal(a, b) for a, b in zip(moved(start, whole, name), moved(start, part, name), strict=True))


def test_groups_of_the_optimiser():
    """One as ever, unless the factor says otherwise: then two that the trainer tells apart by their factor."""
    target = target_of(frozen=2)
    (only,) = build_optimiser(Optim(), target).param_groups
    assert "factor" not in only and len(only["params"]) == len([p for p in target.parameters() if p.requires_grad])
    backbone, heads = build_optimiser(Optim(lr=0.2, backbone_lr=0.1), target).param_groups
    assert (backbone["factor"], heads["factor"]) == (0.1, 1.0) and (backbone["lr"], heads["lr"]) == pytest.approx(
        (0.02, 0.2)
    )
    assert backbone["params"] == [p for p in target.backbone.parameters() if p.requires_grad]
    assert heads["params"] == [*target.head.parameters(), *target.aux_heads.parameters()]
    state = build_optimiser(Optim(backbone_lr=0.1), target).state_dict()
    again = build_optimiser(Optim(backbone_lr=0.1), target)
    again.load_state_dict(state)
    assert [g["factor"] for g in again.param_groups] == [0.1, 1.0]
    (heads,) = build_optimiser(Optim(backbone_lr=0.1), target_of(frozen=5)).param_groups
    assert heads["factor"] == 1.0


def test_a_mistake_on_the_command_line(fasttrain, tmp_path):
    refused(
        fasttrain("train", "smoke", "--target.weights", "no.pth"), "target.weights: there is no weights file no.pth"
    )
    nothing_written(tmp_path)
