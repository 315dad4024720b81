"""No network unless a recipe names a URL, or a library's weights, with a hash; weights by URL; packed data from elsewhere."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from fasttrain.loaders import open_dataset, urls
from fasttrain.loaders.pack import pack
from safetensors.torch import save_file

from fasttrain.build import build_target
from fasttrain.fetch import data_root, fetch_weights
from fasttrain.fields import Data
from fasttrain.models import build_backbone, load_backbone
from fasttrain.recipe import Recipe, Source
from fasttrain.recipe import Target as TargetFields
from fasttrain.sharding import shard
from fasttrain.sources import open_source
from tests.fasttrain.test_more_models import in_hub
from tests.loaders.test_remote import Server, names, serve  # noqa: F401  (a fixture)

TINY = Source(name="tiny", model="timm:test_resnet", weights="default", size=32)


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(urls, "WAITS", ())


@pytest.fixture
def offline(monkeypatch) -> list[str]:
    """What tried to reach another machine; the attempt fails."""
    tried: list[str] = []

    def refuse(*arguments, **_):
        tried.append(str(arguments[1:] or arguments))
        raise OSError("this test has no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_nothing_goes_out_unless_a_hash_is_named(offline, tmp_path):
    """Weights by a library's name, and URLs, are refused without a hash, before anything is asked for."""
    for weights, model in (("default", "timm:test_resnet"), ("IMAGENET1K_V1", "torchvision:resnet18")):
        with pytest.raises(
            ValueError, match=r"sources: s: .* are not on this machine, and are fetched only where sha256"
        ):
            open_source(Source("s", model, weights=weights))
    for backbone, name in (("resnet18", "DEFAULT"), ("timm:test_resnet", "DEFAULT"), ("r3d_18", "KINETICS400_V1")):
        with pytest.raises(ValueError, match=r"target\.weights: .* are not on this machine"):
            load_backbone(build_backbone(backbone), name)
    for sha256, there in (("", "nothing"), ("0" * 63, "'0{63}'"), ("g" * 64, "'g{64}'")):
        with pytest.raises(ValueError, match=rf"https://host/w\.pth: a URL needs sha256 .*, and {there} is there"):
            open_source(replace(TINY, weights="https://host/w.pth", sha256=sha256))
    with pytest.raises(ValueError, match=r"target\.weights: weights s3://b/w\.pth: a URL needs sha256"):
        load_backbone(build_backbone("resnet18"), "s3://b/w.pth")
    with pytest.raises(ValueError, match=r"data\.root: s3://b/t\.beton is a URL, which needs data\.sha256"):
        data_root(Data(name="beton", root="s3://b/t.beton"), print)
    assert not offline and not (tmp_path / "cache").exists()


def test_a_hash_allows_the_download(offline):
    for spec in (
        replace(TINY, sha256="0" * 64),
        Source("s", "torchvision:resnet18", weights="IMAGENET1K_V1", sha256="f37072fd"),
        replace(TINY, weights="https://host/w.pth", sha256="0" * 64),
    ):
        before = len(offline)
        with pytest.raises(ValueError, match=r"cannot read https://.*this test has no network"):
            open_source(spec)
        assert len(offline) > before
    before = len(offline)
    for spec in (
        Source("s", "torchvision:resnet18", weights="IMAGENET1K_V1", sha256="12345678"),  # not what its name says
        replace(TINY, sha256="12345678"),  # too few, where the file's name has none
    ):
        with pytest.raises(ValueError, match="are not on this machine"):
            open_source(spec)
    assert len(offline) == before


def test_what_is_here_is_used_without_a_request(offline, tmp_path):
    """The Hugging Face hub's cache and torch.hub's folder, for sources and targets."""
    network = timm.create_model("test_resnet")
    path = in_hub(tmp_path / "hub", "timm/test_resnet.r160_in1k", network)
    source = open_source(replace(TINY, sha256=digest_of(path)[:8]))
    assert torch.equal(source.network.fc.weight, network.fc.weight) and source.sha256 == digest_of(path)
    with pytest.raises(ValueError, match="sources: tiny has 1000 classes, not 9"):  # a new head would be a random one
        open_source(replace(TINY, classes=9))
    load_backbone(build_backbone("timm:test_resnet"), "DEFAULT")
    full = torchvision.models.resnet18()
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    torch.save(full.state_dict(), tmp_path / "torch/hub/checkpoints/resnet18-f37072fd.pth")
    source = open_source(Source("s", "torchvision:resnet18", weights="default", size=64))
    assert torch.equal(source.network.fc.weight, full.fc.weight)
    assert not offline


def test_a_packaged_recipe_runs_without_a_network(offline, smoke):
    from fasttrain.build import build

    build(smoke())
    assert not offline


def test_weights_at_a_url(tmp_path, serve):  # noqa: F811
    """Fetched once, whole or not at all; a name without an ending is enough for both kinds of files."""
    network = timm.create_model("test_resnet")
    (tmp_path / "web").mkdir()
    save_file(network.state_dict(), tmp_path / "web/a.safetensors")
    torch.save(network.state_dict(), tmp_path / "web/b.pth")
    server: Server = serve(tmp_path / "web")
    for name in ("a.safetensors", "b.pth"):
        digest = digest_of(tmp_path / "web" / name)
        spec = replace(TINY, weights=f"{server.url}/{name}", sha256=digest.upper())
        for _ in range(2):
            source = open_source(spec)
            assert torch.equal(source.network.fc.weight, network.fc.weight) and source.sha256 == digest
        kept = tmp_path / "cache/fasttrain/weights" / digest
        assert server.asked[name] == 1 and kept.is_file()
        kept.write_bytes(kept.read_bytes()[:-1])
        assert fetch_weights(spec.weights, digest) == kept and digest_of(kept) == digest
        assert server.asked[name] == 2
    recipe = Recipe(target=TargetFields(model="timm:test_resnet", weights=f"{server.url}/b.pth", sha256=digest))
    assert digest in build_target(recipe, 5, {}).origin
    assert len(names(tmp_path / "cache")) == 2


def test_weights_that_are_others_are_not_kept(tmp_path, serve, monkeypatch):  # noqa: F811
    (tmp_path / "web").mkdir()
    (tmp_path / "web/w.pth").write_bytes(b"w" * 1000)
    server: Server = serve(tmp_path / "web")
    with pytest.raises(ValueError, match=r"w\.pth has the SHA-256 [0-9a-f]{64}, not 0{64}: it is another file"):
        fetch_weights(f"{server.url}/w.pth", "0" * 64)
    with pytest.raises(ValueError, match="HTTP status 404"):
        fetch_weights(f"{server.url}/none.pth", "0" * 64)
    monkeypatch.setattr("fasttrain.fetch.MAX_WEIGHTS", 999)
    with pytest.raises(ValueError, match="has 1000 bytes, and 999 are the most that are taken from it"):
        fetch_weights(f"{server.url}/w.pth", "0" * 64)
    assert not names(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    with pytest.raises(ValueError, match=r"cannot keep http://.*/w\.pth at /dev/null/cache/.*: Not a directory"):
        fetch_weights(f"{server.url}/w.pth", "0" * 64)


FETCH = r"""
import os, sys
from fasttrain.fetch import fetch_weights

for _ in range(7):
    if not os.fork():
        break
os.write(1, f"{fetch_weights(sys.argv[1], sys.argv[2])}\n".encode())
"""


def test_eight_processes_fetch_once(tmp_path, serve):  # noqa: F811
    (tmp_path / "web").mkdir()
    (tmp_path / "web/w.pth").write_bytes(os.urandom(1 << 20))
    server: Server = serve(tmp_path / "web")
    server.wait = 0.5
    digest = digest_of(tmp_path / "web/w.pth")
    command = [sys.executable, "-c", FETCH, f"{server.url}/w.pth", digest]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    kept = tmp_path / "cache/fasttrain/weights" / digest
    assert not out.stderr and out.stdout.split() == [str(kept)] * 8
    assert server.asked["w.pth"] == 1 and names(tmp_path / "cache") == [digest]


def test_where_data_lie(tmp_path):
    """As ``data.root`` says; in the cache where that is a URL, a list, or where a cache is named."""
    packed = tmp_path / "shared/toy.beton"
    packed.parent.mkdir()
    pack(open_dataset("toy"), packed, raw=True, workers=1)
    assert data_root(Data(name="beton", root=str(packed)), print) == str(packed)
    assert data_root(Data(name="toy"), print) is None
    cache = tmp_path / "disk"
    copied = data_root(Data(name="beton", root=str(packed), cache=str(cache)), print)
    digest = shard(packed, str(packed.parent), size=1 << 20)["sha256"]
    listed = f"{packed}.shards.json"
    places = [
        Data(name="beton", root=str(packed), cache=str(cache)),
        Data(name="beton", root=listed, cache=str(cache), sha256=digest),
        Data(name="beton", root=f"file://{packed}", cache=str(cache), sha256=digest),
        Data(name="beton", root=f"file://{listed}", sha256=digest),
        Data(name="beton", root=listed),
    ]
    found = [data_root(place, lambda _: None) for place in places]
    own = tmp_path / "cache/fasttrain/data" / digest[:16] / "toy.beton"
    assert found == [str(cache / digest[:16] / "toy.beton")] * 3 + [str(own)] * 2
    assert all(Path(p).read_bytes() == packed.read_bytes() for p in {copied, *found} if p)
    shutil.rmtree(packed.parent)
    assert data_root(places[1], lambda _: None) == found[1]


def test_mistakes_about_data(tmp_path):
    for data, message in (
        (
            Data(name="folder", root="s3://a/b", sha256="0" * 64),
            r"data\.root: s3://a/b is a URL, and data\.name is folder",
        ),
        (Data(name="folder", root="/a", cache="/b"), r"data\.cache is given, and data\.name is folder: only packed"),
        (Data(name="beton", root="/a/b.beton", sha256="12"), r"data\.sha256: '12' is not the 64 digits"),
        (Data(name="beton", root=str(tmp_path / "b.beton"), cache="/c"), r"data\.root: there is no file .*/b\.beton"),
        (Data(name="beton", root="ftp://::x/b", sha256="0" * 64), "one is not put into another"),
    ):
        with pytest.raises(ValueError, match=message):
            data_root(data, print)
