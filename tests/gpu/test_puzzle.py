"""On a CUDA device: puzzles with the bytes that the CPU cuts, and labels that do not depend on how images come."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fasttrain.loaders import LoaderSpec, Puzzle, ViewPlan, open_dataset, open_loader

from fasttrain import compare
from fasttrain.pretext.labels import make_labels, read_labels
from fasttrain.recipe import load

pytestmark = pytest.mark.gpu
FIELDS = "--method.name scratch --data.views 0 --pretext.clusters 6 --pretext.width 8 --pretext.hidden 16"
FIELDS += " --pretext.permutations 9"


@pytest.mark.parametrize("grey", [0.0, 0.5])
def test_the_same_bytes_as_on_the_cpu(grey):
    dataset = open_dataset("toy")
    spec = LoaderSpec(
        dataset, dataset.splits["train"], ViewPlan(pad=0), 36, 40, 33, puzzle=Puzzle(permutations=701, grey=grey)
    )
    for here, there in zip(open_loader("resident", spec), open_loader("resident", spec, "cuda"), strict=True):
        assert there.pixels.is_cuda and torch.equal(there.pixels.cpu(), here.pixels)
        assert torch.equal(there.targets.cpu(), here.targets)
        assert there.pixels.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_puzzle_is_learned_and_labels_do_not_depend_on_batches(tmp_path):
    recipe = load("smoke", ["--run.dir", str(tmp_path), "--name", "puzzle", *FIELDS.split(), "--run.compile", "false"])
    solved = replace(recipe, pretext=replace(recipe.pretext, task="jigsaw"), data=replace(recipe.data, size=36, pad=0))
    compare.run(solved, lambda label, line: None)
    found = []
    for batch in (32, 50):
        wanting = replace(recipe, data=replace(recipe.data, labels=str(tmp_path / "puzzle"), batch=batch))
        make_labels(wanting, lambda text: None)
        found.append(read_labels(wanting).label_N)
        for path in (tmp_path / "puzzle/clusters").iterdir():
            path.unlink()
    assert np.array_equal(*found) and len(set(found[0])) > 1
