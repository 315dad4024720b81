"""Suite ``cifar`` on a few images, and what it compares ours with."""

import json

import pytest
import torch
from fasttrain.benchmarks import cifar


def test_cifar(fasttrain, tmp_path):
    """Through the real command line: what runs without a GPU runs, what does not says why."""
    tiny = ("--models", "timm:test_resnet,timm:test_resnet", "--batch", "8", "--images", "32", "--repeats", "1")
    rows = "plain eager loop;ours, off;ours, step;step alone"
    done = fasttrain("bench", "cifar", *tiny, "--rows", rows, "--json", "out.json", FASTTRAIN_BENCH_TURN="0.1")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    found = {row["name"]: row for row in content["rows"]}
    on_cuda = {"ours, step", "step alone"}
    assert set(found) | set(content["not_run"]) == set(rows.split(";"))
    if not torch.cuda.is_available():
        assert set(content["not_run"]) == on_cuda
    assert all(row["images_per_s"] > 0 for row in found.values())
    ours = found["ours, off"]
    assert ours["step_ms"] == pytest.approx(8e3 / ours["images_per_s"])
    assert ours["relative_to"][cifar.PLAIN] == ours["images_per_s"] / found[cifar.PLAIN]["images_per_s"]
    assert found[cifar.PLAIN]["relative_to"] == {} and ours["shares"]["target"] > 0


def test_the_plain_loop_crops_and_mirrors_each_image_by_itself():
    image = torch.arange(1, 1 + 5 * 5, dtype=torch.uint8).view(1, 1, 5, 5).expand(64, 3, 5, 5)
    padded = torch.nn.functional.pad(image[0], (2, 2, 2, 2))
    windows = [padded[:, y : y + 5, x : x + 5] for y in range(5) for x in range(5)]
    windows += [window.flip(2) for window in windows]
    found = cifar.augmented(image, pad=2)
    seen = {next(i for i, window in enumerate(windows) if torch.equal(window, one)) for one in found}
    assert len(seen) > 20 and {i < 25 for i in seen} == {True, False}


def test_the_plain_loop_learns(tmp_path):
    """The labels that it is given, with soft labels that say the same of every image."""
    cifar.write_images(tmp_path, 32)
    asked = {
        "folder": str(tmp_path),
        "target": "resnet20",
        "models": ["timm:test_resnet"],
        "batch": 16,
        "module": False,
    }
    plain = cifar.Plain(cifar.build(cifar.recipe(asked, False)), compiled=False)
    plain.soft_NC.zero_()
    plain.labels_N.zero_()
    before = plain.network.head.bias.detach().clone()
    assert plain.steps(4) == 64
    change = plain.network.head.bias.detach() - before
    assert int(change.argmax()) == 0 and (change[1:] < 0).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--rows", "fast"), "no row 'fast'"), (("--batch", "0"), "below 1"), (("--speed", "9"), "--speed 9")],
)
def test_arguments_that_make_no_sense(arguments, said):
    with pytest.raises(ValueError, match=said):
        cifar.run(list(arguments))
