"""On a CUDA device: clusters with the bits that the CPU finds."""

import pytest
import torch

from fasttrain.pretext.kmeans import kmeans, nearest, plus_plus

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_same_bits_as_on_the_cpu(dtype):
    x = ((torch.randn(40, 65))[torch.randint(40, (20000,))] + torch.randn(20000, 65)).to(dtype)
    assert torch.equal(plus_plus(x.cuda(), 40, seed=1).cpu(), plus_plus(x, 40, seed=1))
    there, here = (kmeans(v, 40, seed=1, iterations=30) for v in (x.cuda(), x))
    assert torch.equal(there.centroid_KD.cpu(), here.centroid_KD) and torch.equal(there.count_K.cpu(), here.count_K)
    assert (there.inertia, there.iterations, there.settled) == (here.inertia, here.iterations, here.settled)
    for count in (1, 5):
        found = nearest(x.cuda(), there.centroid_KD, count)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, nearest(x, here.centroid_KD, count), strict=True))
