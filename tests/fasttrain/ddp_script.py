"""Two processes: the gradient of a step by ``fasttrain.reduce`` and by torch's DistributedDataParallel (see test_ranks.py)."""

import os

import torch
from torch import nn

from fasttrain.ranks import joined
from fasttrain.reduce import GradientSum


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).to(
        memory_format=torch.channels_last
    )


def main() -> None:
    with joined(60, False) as ranks:
        torch.manual_seed(10 + ranks.rank)
        x, y = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
        theirs = nn.parallel.DistributedDataParallel(network())
        nn.functional.cross_entropy(theirs(x), y).backward()
        mine = network()
        gradients = GradientSum(list(mine.parameters()), ranks, bucket_bytes=4096)
        for step in range(3):  # views of the buckets are used again
            for part in range(2):
                loss = nn.functional.cross_entropy(mine(x[part * 3 :][:3]), y[part * 3 :][:3]) / 4
                if part == 1:
                    gradients.begin()
                loss.backward()
            gradients.finish()
            for a, b in zip(mine.parameters(), theirs.module.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
                assert a.grad.stride() == a.stride()
            gradients.clear()
            assert step >= 0 and not any(p.grad.any() for p in mine.parameters())
        gradients.close()
        torch.manual_seed(ranks.rank)
        other = nn.Linear(4, 3)
        ranks.share(other.state_dict().values())
        torch.manual_seed(0)
        assert torch.equal(other.weight, nn.Linear(4, 3).weight)
        os.write(1, b"alike\n")


main()
