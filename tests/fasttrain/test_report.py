"""The page that a run leaves: Grad-CAM as published, what was confused, gradient cosines, and sentences that are true."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fasttrain.loaders import Dataset
from PIL import Image
from torch import nn

from fasttrain import compare, figures, gradcam, report, report_data
from fasttrain.details import MOST_CLASSES, by_class, condensed, over_seeds
from fasttrain.models import Target, build_backbone
from fasttrain.recipe import load
from fasttrain.saliency import chosen_samples

PLAIN = ("--run.tensorboard", "false", "--data.size", "12", "--data.stored", "12", "--optim.epochs", "1")


class Tiny(nn.Module):
    """A network with a head that is no linear function of its pooled map; ``form`` says how the map is made and pooled."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.conv, self.norm = form, nn.Conv2d(3, 6, 3, 2, 1), nn.Identity()
        self.relu, self.pool, self.head = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4)

    def forward(self, x):
        map_ = self.conv(x)
        if self.form == "in place":  # as torchvision's DenseNet: neither ReLU nor pooling is a module
            pooled = F.relu(map_, inplace=True).mean((2, 3))
        elif self.form == "channels at the end":  # as timm's Swin
            pooled = self.norm(self.relu(map_).permute(0, 2, 3, 1)).mean((1, 2))
        else:
            pooled = self.pool(self.relu(map_)).flatten(1)
        return self.head(torch.tanh(pooled))


def by_hand(network: Tiny, x: torch.Tensor, class_B: list[int]) -> np.ndarray:
    """Eq. 1 and 2 of the paper, sums written out, in float64: the pooled map's tanh goes into a linear layer."""
    map_ = F.relu(network.conv(x)).detach().numpy()
    weight = network.head.weight.detach().numpy()
    out = np.zeros((len(x), *map_.shape[2:]))
    for b, k in enumerate(class_B):
        places = map_[b, 0].size
        for c in range(map_.shape[1]):
            slope = weight[k, c] * (1 - np.tanh(map_[b, c].mean()) ** 2) / places  # the same at every place
            out[b] += slope * map_[b, c]
    return np.maximum(out, 0)


@pytest.mark.parametrize("form", ["modules", "in place", "channels at the end"])
def test_grad_cam_is_the_papers(form):
    torch.manual_seed(1)
    network = Tiny(form).double().eval().requires_grad_(False)
    x = torch.randn(3, 3, 9, 7, dtype=torch.float64)
    wanted = by_hand(network, x, [2, 0, 2])
    found = gradcam.explain(network, x, torch.tensor([2, 0, 2]))
    assert wanted.max() > 0
    np.testing.assert_allclose(found.cam.numpy(), wanted, rtol=1e-5, atol=1e-9)
    best = network(x).argmax(1)
    said = gradcam.explain(network, x)
    assert torch.equal(said.class_B, best) and torch.allclose(said.logits_BK, network(x).float())
    np.testing.assert_allclose(said.cam.numpy(), by_hand(network, x, best.tolist()), rtol=1e-5, atol=1e-9)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_map_peaks_where_the_logit_comes_from(corner):
    """The logit is the mean brightness of one corner's pixels; and of its negative nothing speaks for it."""

    class Corner(nn.Module):
        def forward(self, x):
            mask = torch.zeros(x.shape[2:])
            mask[corner[0] * 8 :][:4, corner[1] * 8 :][:, :4] = 1
            return x * mask

    conv = nn.Conv2d(3, 1, 1, bias=False)
    conv.weight.data.fill_(1 / 3)
    head = nn.Linear(1, 2, bias=False)
    head.weight.data[:] = torch.tensor([[1.0], [-1.0]])
    network = nn.Sequential(conv, Corner(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    x = torch.rand(2, 3, 12, 12) + 0.5
    cam_BHW = gradcam.enlarged(gradcam.explain(network, x, torch.tensor([0, 1])).cam, size=24)
    top, left = divmod(int(cam_BHW[0].argmax()), 24)
    assert (top >= 16 if corner[0] else top < 8) and (left >= 16 if corner[1] else left < 8)
    assert cam_BHW[0].max() > 0 and cam_BHW[1].max() == 0


@pytest.mark.parametrize(
    ("model", "shape"), [("resnet20", (3, 16, 16)), ("densenet121", (3, 64, 64)), ("resnet3d18", (3, 8, 40, 40))]
)
def test_of_targets_it_is_the_class_activation_map(model, shape):
    """With a linear layer on the mean of the map, Grad-CAM is ``ReLU(sum_c W_kc A_c)`` over the number of places (its Sec. 3)."""
    torch.manual_seed(0)
    options = {"width": 0.125} if model == "resnet3d18" else {}
    target = Target(build_backbone(model, **options), 3).eval()
    x, class_B = torch.randn(2, *shape), torch.tensor([2, 1])
    _, last = target.backbone(x)
    wanted = torch.einsum("bc,bc...->b...", target.head.weight[class_B], last).relu() / last[0, 0].numel()
    found = gradcam.explain(target, x, class_B)
    assert wanted.max() > 0 and torch.allclose(found.cam, wanted, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in target.parameters())
    frames = shape[1] if len(shape) == 4 else 0
    assert gradcam.enlarged(found.cam, size=20, frames=frames).shape == (2, 20, 20)


def test_a_network_without_a_map_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    one_place = Target(build_backbone("resnet20"), 3).eval()
    for network, side in ((flat, 8), (one_place, 4)):
        with pytest.raises(ValueError, match=r"several places|one place"):
            gradcam.explain(network, torch.randn(2, 3, side, side))


def test_samples_are_the_first_of_different_classes():
    def dataset(targets_N: np.ndarray) -> Dataset:
        return Dataset("x", ("a", "b", "c"), targets_N, lambda index: None, {"test": np.arange(2, len(targets_N))}, "")

    assert chosen_samples(dataset(np.array([1, 0, 0, 0, 1, 0, 2, 1]))).tolist() == [2, 4, 6, 3]
    assert chosen_samples(dataset(np.array([1, 0, 0, 0, 0]))).tolist() == [2, 3, 4]
    shown = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0], [0, -1, 1], [0, 1, 0]], dtype=np.float32)
    assert chosen_samples(dataset(shown)).tolist() == [2, 4, 5]  # nothing counts as shown in 3


def test_details_of_many_classes_are_condensed():
    few = {"confusion": [[3, 1], [0, 4]]}
    assert condensed(few) == few and by_class(few) == [75, 100]
    count_KK = np.zeros((MOST_CLASSES + 1,) * 2, dtype=int)
    np.fill_diagonal(count_KK, 8)
    count_KK[7, 3], count_KK[3, 7], count_KK[100, 0] = 2, 24, 5
    count_KK[50] = 0
    many = condensed({"confusion": count_KK.tolist()})
    assert set(many) == {"confused", "class_accuracy"}
    assert many["confused"] == [[24, 3, 7], [5, 100, 0], [2, 7, 3]]
    assert by_class(many) == many["class_accuracy"]
    assert [many["class_accuracy"][k] for k in (0, 3, 7, 50)] == [100, 25, 80, None]
    json.dumps(many)


def test_details_over_seeds():
    assert over_seeds([{"confusion": [[3, 1], [0, 4]]}, {"confusion": [[1, 3], [2, 2]]}]) == {
        "confusion": [[4, 4], [2, 6]]
    }
    each = [{"confused": [[5, 0, 1], [2, 1, 0]], "class_accuracy": [50.0, None]}]
    each += [{"confused": [[4, 1, 0], [1, 2, 1]], "class_accuracy": [100.0, None]}]
    assert over_seeds(each) == {"confused": [[6, 1, 0], [5, 0, 1], [1, 2, 1]], "class_accuracy": [75, None]}
    assert over_seeds([{"ap_per_class": [10.0, None]}, {"ap_per_class": [20.0, None]}]) == {"ap_per_class": [15, None]}


class Made:
    """A run, what its page was written from, and the page."""

    def __init__(self, recipe) -> None:
        self.recipe, self.jobs = recipe, compare.jobs_of(recipe)
        self.table = compare.run(recipe, lambda label, line: None)
        self.root = Path(recipe.run.dir) / recipe.name
        self.summaries = [json.loads((job.folder / "summary.json").read_text()) for job in self.jobs]
        self.page = (self.root / "report.html").read_text()

    def again(self, **changes) -> str:
        """The page made anew, with other jobs or summaries; its pictures are not drawn."""
        given = {"recipe": self.recipe, "table": self.table, "jobs": self.jobs, "summaries": self.summaries} | changes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(figures, "_embedded", lambda figure, name: f'<img alt="{name}" src="data:image/png;base64,">')
            report.write(self.root / "again.html", **given)
        return (self.root / "again.html").read_text()


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory):
    """Labels alone and SSKT, two seeds each."""
    where = ("--run.dir", str(tmp_path_factory.mktemp("smoke")), "--seeds", "2", "--data.labelled", "60")
    recipe = load("smoke", [*PLAIN, *where, "--run.cosine_every", "1", "--run.log_every", "1"])
    return Made(replace(recipe, rows={"scratch": {"method": {"name": "scratch"}}, "sskt": {}}))


@pytest.fixture(scope="module")
def several_labels(tmp_path_factory):
    """A list of images with one or two of three labels each."""
    root, random = tmp_path_factory.mktemp("several"), np.random.default_rng(0)
    lines = ["path,labels,split"]
    for i in range(24):
        Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(root / f"{i}.png")
        split = "test" if i % 3 == 0 else "val" if i % 3 == 1 else "train"
        lines.append(f"{i}.png,{('cat', 'dog|cat', 'bird')[i // 3 % 3]},{split}")
    (root / "list.csv").write_text("\n".join(lines))
    where = ("--run.dir", str(root / "runs"), "--data.name", "list", "--data.root", str(root), "--data.batch", "8")
    more = ("--run.protocol", "paper", "--data.crop", "centre")
    return Made(load("smoke", [*PLAIN, *where, *more, "--name", "several"]))


USE = "use of the machine"


def pictures(page: str) -> list[str]:
    return re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,', page)


def test_the_page_of_a_comparison(two_rows):
    page = two_rows.page
    assert pictures(page) == ["curves", "gradient cosines", "confusion matrices", "Grad-CAM", USE]
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert (
        "Weights were selected by accuracy on the validation split; the test split was looked at once per run." in page
    )
    assert "No map of" not in page and "Not shown" not in page
    assert "sources tiny (timm:test_resnet); linear heads; cross entropy at T = 1, alpha = 1" in page
    assert "2 seeds together" in page
    for job, summary in zip(two_rows.jobs, two_rows.summaries, strict=True):
        count_KK = np.array(summary["details"]["confusion"])
        assert 100 * count_KK.trace() / count_KK.sum() == pytest.approx(summary["test"]["accuracy"], abs=1e-4), (
            job.label
        )


def test_the_cosines_are_those_of_the_log(two_rows):
    lines = [json.loads(t) for j in two_rows.jobs[1::2] for t in (j.folder / "metrics.jsonl").read_text().splitlines()]
    values = [line["cosine/tiny"] for line in lines if "cosine/tiny" in line]
    assert len(values) >= 4
    below = 100 * np.mean(np.array(values) < 0)
    assert f"<tr><td>sskt<td>tiny<td>{np.mean(values):+.3f}<td>{below:.0f}" in two_rows.page
    bare = [replace(job, row="scratch") for job in two_rows.jobs if job.row == "scratch"]
    assert "Gradient cosines" not in two_rows.again(jobs=bare, summaries=two_rows.summaries[::2])


def test_classes_that_no_picture_can_name(two_rows, monkeypatch):
    monkeypatch.setattr(figures, "_NAMED", 2)
    page = two_rows.again()
    assert pictures(page) == ["curves", "gradient cosines", "Grad-CAM", USE]
    count_KK = sum(np.array(s["details"]["confusion"]) for s in two_rows.summaries[1::2])
    np.fill_diagonal(count_KK, 0)
    rows = re.findall(r"<tr><td>(\w+)<td>(\w+)<td>(\d*)<td>(\d+)", page)
    assert sum(int(n) for *_, n in rows) == count_KK.sum() > 0 and int(rows[0][3]) == count_KK.max()
    assert "The classes that gain and lose most" in page


def test_what_cannot_be_shown_is_a_sentence(two_rows, monkeypatch):
    """Sources whose weights are gone, a run's checkpoint gone, data gone: the page is written."""
    gone = [replace(s, weights="/gone.pth") for s in two_rows.recipe.sources]
    jobs = [replace(j, recipe=replace(j.recipe, sources=gone)) for j in two_rows.jobs]
    page = two_rows.again(jobs=jobs)
    assert "No map of tiny: there is no weights file /gone.pth." in page and "Grad-CAM" in pictures(page)
    selected = two_rows.jobs[0].folder / "checkpoints" / "selected.pt"
    selected.rename(selected.with_suffix(".away"))
    page = two_rows.again()
    selected.with_suffix(".away").rename(selected)
    assert "No map of scratch: " in page and "no checkpoints/selected.pt" in page and "Grad-CAM" in pictures(page)

    def lost(*_, **__):
        raise ValueError("no such data")

    monkeypatch.setattr(report_data, "open_data", lost)
    page = two_rows.again()
    assert "Not shown: no such data" in page and pictures(page) == ["curves", "gradient cosines", USE]


def test_summaries_of_older_runs_have_no_details(two_rows):
    old = [{k: v for k, v in s.items() if k != "details"} for s in two_rows.summaries]
    page = two_rows.again(summaries=old)
    assert "<h2>Classes" not in page and "Grad-CAM" in pictures(page)


def test_the_page_of_several_labels(several_labels):
    (summary,), page = several_labels.summaries, several_labels.page
    ap_K = summary["details"]["ap_per_class"]
    assert summary["metric"] == "map" and np.mean(ap_K) == pytest.approx(summary["test"]["map"])
    assert "<th>mAP %<th>mAP at 11 points %<th>AP of images %" in page
    assert pictures(page) == ["curves", "average precision %", "Grad-CAM", USE] and "No map of" not in page
    assert "Weights were selected by mAP on the test split itself" in page and "looked at once" not in page


def test_rows_on_different_data_sets(two_rows, several_labels):
    """Each has its own figures, its own way to select, and its own sections."""
    other = [replace(job, row="several") for job in several_labels.jobs]
    row = several_labels.table["rows"][0] | {"name": "several"}
    page = two_rows.again(
        jobs=[*two_rows.jobs, *other],
        summaries=two_rows.summaries + several_labels.summaries,
        table=two_rows.table | {"rows": [*two_rows.table["rows"], row]},
    )
    assert "<th>accuracy %<th>mAP %" in page
    assert "scratch, sskt: Weights were selected by accuracy on the validation split" in page
    assert "several: Weights were selected by mAP on the test split itself" in page
    for title in ("Classes", "What the networks look at"):
        assert f"<h2>{title}: toy</h2>" in page and f"<h2>{title}: list</h2>" in page


def test_the_page_of_clips(tmp_path):
    """Figures of each class are of videos, not of clips; sources look at middle frames."""
    less = (
        "--data.labelled",
        "16",
        "--data.batch",
        "8",
        "--data.frames",
        "4",
        "--data.size",
        "40",
        "--data.clips",
        "2",
    )
    how = ("--target.width", "0.0625", "--method.name", "sskt", "--optim.epochs", "1", "--transfer.still", "32")
    source = '[{name: tiny, model: "timm:test_resnet", weights: random, classes: 1000, size: 32}]'
    where = ("--run.dir", str(tmp_path), "--run.tensorboard", "false", "--sources", source, "--rows", "{}")
    made = Made(load("motion", [*less, *how, *where]))
    assert pictures(made.page) == ["curves", "confusion matrices", "Grad-CAM", "frames of a clip"]
    assert "No map of" not in made.page and "their middle frames" in made.page
    assert "Weights are the last epoch&#x27;s; the test split was looked at once per run." in made.page
    assert np.sum(made.summaries[0]["details"]["confusion"]) == 240


METHODS = {
    ("--method.name", "scratch"): "labels alone",
    ("--method.name", "kd", "--transfer.module", "true"): "teachers tiny (timm:test_resnet); T = 4, weight 0.9 of 1",
    ("--method.name", "dml"): "peers resnet20",
    ("--method.name", "dml", "--method.peers", "[resnet32]", "--method.peer_weights", "[/w/some.pth]"): (
        "peers resnet32 from some.pth"
    ),
    ("--method.name", "maxl", "--method.order", "first"): (
        "generator vgg16_bn, lr 0.001; 5 sub-classes of each class, entropy 0.2; gradient of first order"
    ),
    ("--transfer.module", "true", "--transfer.loss", "kd", "--transfer.temperature", "3"): (
        "sources tiny (timm:test_resnet); transfer modules (sum of the branches); divergence at T = 3, alpha = 1"
    ),
}


@pytest.mark.parametrize(("given", "said"), METHODS.items())
def test_a_method_in_words(given, said):
    recipe = load("smoke", list(given))
    table = report._methods([compare.Job("the row", recipe, Path())])
    assert f"<tr><td>the row<td>resnet20<td>{recipe.method.name}<td>{said}</table>" in table
    again = replace(recipe, target=replace(recipe.target, weights="/runs/x/pretext/seed0/checkpoints/selected.pt"))
    assert "<td>resnet20 from pretext/seed0<td>" in report._methods([compare.Job("the row", again, Path())])
