"""Batch norm over the parts of a batch that several processes hold.

On GPUs it is PyTorch's, as timm converts it (layers with an activation of their own, too). PyTorch's refuses CPUs, so here is the
same for them: slower, since each layer waits twice for the others, but exact.

Shape suffixes: N samples and places in the image together, C channels.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synchronised(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with synchronised batch norms in the place of its own; parameters and their names stay.

    Raises:
        ValueError: on a CPU, a kind of batch norm that is not PyTorch's plain one.
    """
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, SyncedBatchNorm):
                if type(child) not in _PLAIN:
                    raise ValueError(f"run.sync_batch_norm: on a CPU there is none for {type(child).__name__}")
                setattr(module, name, SyncedBatchNorm.like(child))
    return network


class SyncedBatchNorm(_BatchNorm):
    """Batch norm whose mean and variance are of all processes' inputs, by Gloo."""

    @classmethod
    def like(cls, norm: _BatchNorm) -> "SyncedBatchNorm":
        """With the parameters and statistics of a plain one."""
        out = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        out._parameters, out._buffers, out.training = norm._parameters, norm._buffers, norm.training
        return out

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() > 1

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """float [B, C, ..] -> the same shape."""
        if not self.training:
            return super().forward(input)
        x_NC = input.movedim(1, -1).reshape(-1, input.shape[1])
        out_NC, mean_C, var_C, count = _Normalise.apply(x_NC, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            momentum = self.momentum if self.momentum is not None else 0.1
            with torch.no_grad():
                self.running_mean.lerp_(mean_C, momentum)
                self.running_var.lerp_(var_C * (count / (count - 1)), momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked += 1
        return out_NC.reshape(input.shape[0], *input.shape[2:], input.shape[1]).movedim(-1, 1)


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, mean and variance over all processes."""

    @staticmethod
    def forward(ctx, x_NC, weight, bias, eps):
        sum_C1 = torch.cat([x_NC.sum(0, dtype=torch.float64), torch.tensor([len(x_NC)], dtype=torch.float64)])
        dist.all_reduce(sum_C1)
        count, mean_C = float(sum_C1[-1]), sum_C1[:-1] / sum_C1[-1]
        var_C = (x_NC.double() - mean_C).square().sum(0)
        dist.all_reduce(var_C)
        var_C = var_C / count
        scale_C = (var_C + eps).rsqrt()
        normed_NC = ((x_NC.double() - mean_C) * scale_C).to(x_NC.dtype)
        ctx.save_for_backward(normed_NC, scale_C, weight)
        ctx.count = count
        out_NC = normed_NC if weight is None else normed_NC * weight + bias
        found = mean_C.float(), var_C.float()
        ctx.mark_non_differentiable(*found)
        return out_NC, *found, count

    @staticmethod
    def backward(ctx, grad_NC, *_):
        normed_NC, scale_C, weight = ctx.saved_tensors
        sum_2C = torch.stack([grad_NC.sum(0, dtype=torch.float64), (grad_NC * normed_NC).sum(0, dtype=torch.float64)])
        own_2C = sum_2C.clone()  # gradients of weight and bias are added up with all others
        dist.all_reduce(sum_2C)
        mean_2C = sum_2C / ctx.count
        factor_C = scale_C if weight is None else scale_C * weight
        back_NC = (grad_NC - mean_2C[0] - normed_NC * mean_2C[1]) * factor_C
        its = (None, None) if weight is None else (own_2C[1].to(weight.dtype), own_2C[0].to(weight.dtype))
        return back_NC.to(grad_NC.dtype), *its, None
