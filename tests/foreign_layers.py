"""Small imitations of other libraries' normalization layers, under the names that these have, and of impostors."""

import torch
from torch import nn
from torch.nn import functional


class FrozenBatchNorm2d(nn.Module):
    """torchvision's and detectron2's: four buffers and an affine map."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).view(1, -1, 1, 1)
        return x * scale + self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: the code of torch's forward, then a dropout and an activation."""

    def __init__(self, num_features, act=nn.ReLU, **settings):
        super().__init__(num_features, **settings)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x):
        rate = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        of_batch = self.training or (self.running_mean is None and self.running_var is None)
        kept = (self.running_mean, self.running_var) if not self.training or self.track_running_stats else (None, None)
        x = functional.batch_norm(x, *kept, self.weight, self.bias, of_batch, rate, self.eps)
        return self.act(self.drop(x))


class SyncBatchNormAct(nn.SyncBatchNorm):
    """timm's."""

    def __init__(self, num_features, act=nn.ReLU):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """timm's."""

    def __init__(self, num_features, act=nn.ReLU):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class GroupNormAct(nn.GroupNorm):
    """timm's."""

    def __init__(self, num_channels, num_groups=2):
        super().__init__(num_groups, num_channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)))


class LayerNorm2d(nn.LayerNorm):
    """timm's and torchvision's: over the channels of each position."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ABN(nn.Module):
    """inplace_abn's: the activation by its name."""

    def __init__(self, num_features, eps=1e-5, momentum=0.1, activation="leaky_relu", activation_param=0.2):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.activation, self.activation_param = activation, activation_param
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def scale(self):
        return self.weight

    def forward(self, x):
        kept = (self.running_mean, self.running_var, self.scale(), self.bias)
        x = functional.batch_norm(x, *kept, self.training, self.momentum, self.eps)
        if self.activation == "leaky_relu":
            return functional.leaky_relu(x, self.activation_param, inplace=True)
        return functional.relu(x, inplace=True) if self.activation == "relu" else x


class InPlaceABN(ABN):
    """inplace_abn's: it multiplies by |weight| + eps."""

    def scale(self):
        return self.weight.abs() + self.eps


def _mmcv_forward(self, x):
    return functional.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
    )


def _mmcv_init(self, num_features, eps=1e-5, momentum=0.1):
    nn.Module.__init__(self)
    self.num_features, self.eps, self.momentum, self.group, self.track_running_stats = (
        num_features, eps, momentum, None, True,
    )  # fmt: skip
    self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
    self.register_buffer("running_mean", torch.zeros(num_features))
    self.register_buffer("running_var", torch.ones(num_features))


# mmcv's has the name of torch's and is none of its classes.
MmcvSyncBatchNorm = type(
    "SyncBatchNorm", (nn.Module,), {"__init__": _mmcv_init, "forward": _mmcv_forward, "__module__": __name__}
)


class KerasNorm(nn.Module):
    """A translation of Keras' layer: its names, its momentum, the biased variance."""

    def __init__(self, channels, momentum=0.99, epsilon=1e-3):
        super().__init__()
        self.momentum, self.epsilon = momentum, epsilon
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("moving_mean", torch.zeros(channels))
        self.register_buffer("moving_variance", torch.ones(channels))

    def forward(self, x):
        mean, var = self.moving_mean, self.moving_variance
        if self.training:
            axes = (0, *range(2, x.ndim))
            mean = x.mean(axes)
            var = (x - mean.view(1, -1, *(1 for _ in x.shape[2:]))).square().mean(axes)
            with torch.no_grad():
                self.moving_mean.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)
                self.moving_variance.mul_(self.momentum).add_(var, alpha=1 - self.momentum)
        wide = (1, -1, *(1 for _ in x.shape[2:]))
        scale = self.gamma / (var + self.epsilon).sqrt()
        return (x - mean.view(wide)) * scale.view(wide) + self.beta.view(wide)


class ArticleNorm(nn.Module):
    """A tutorial's: state of shape (1, C, 1, 1), replaced and not written."""

    def __init__(self, num_features, num_dims=4):
        super().__init__()
        shape = (1, num_features, 1, 1) if num_dims == 4 else (1, num_features)
        self.gamma, self.beta = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("moving_mean", torch.zeros(shape))
        self.register_buffer("moving_var", torch.ones(shape))

    def forward(self, x):
        mean, var = self.moving_mean, self.moving_var
        if self.training:
            axes = (0, *range(2, x.ndim))
            mean = x.mean(axes, keepdim=True)
            var = (x - mean).square().mean(axes, keepdim=True)
            self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
            self.moving_var = 0.9 * self.moving_var + 0.1 * var.detach()
        return self.gamma * (x - mean) / torch.sqrt(var + 1e-5) + self.beta


class ChannelsFirstLayerNorm(nn.Module):
    """As ConvNeXt and detectron2 write it."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), 1e-6

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / (((x - mean) ** 2).mean(1, keepdim=True) + self.eps).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class LlamaRMSNorm(nn.Module):
    """transformers': in float32 whatever it is given."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(channels)), 1e-6

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class GemmaRMSNorm(nn.Module):
    """transformers': by 1 + weight."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(channels)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


# Impostors: the state of a normalization, and something else in the forward.


class Deviation(KerasNorm):
    """Divides by the variance, not by its root."""

    def forward(self, x):
        wide = (1, -1, *(1 for _ in x.shape[2:]))
        scale = self.gamma / (self.moving_variance + self.epsilon)
        return (x - self.moving_mean.view(wide)) * scale.view(wide) + self.beta.view(wide)


class OutsideTheRoot(FrozenBatchNorm2d):
    """Adds eps to the deviation."""

    def forward(self, x):
        scale = (self.weight / (self.running_var.sqrt() + self.eps)).view(1, -1, 1, 1)
        return (x - self.running_mean.view(1, -1, 1, 1)) * scale + self.bias.view(1, -1, 1, 1)


class Clipped(nn.BatchNorm2d):
    """A batch norm, and something more that no child is."""

    def forward(self, x):
        return super().forward(x).clamp(max=0.5)


class Scaled(nn.BatchNorm2d):
    """Another function in training than in evaluation."""

    def forward(self, x):
        return super().forward(x) * (0.5 if self.training else 1.0)


class StoresTheDeviation(KerasNorm):
    """Its moving variance is an average of something else."""

    def forward(self, x):
        kept = self.moving_variance.clone()
        output = super().forward(x)
        if self.training:
            self.moving_variance.copy_(kept * 0.99 + 0.01 * x.std((0, *range(2, x.ndim))))
        return output


class StoresSomethingBeside(KerasNorm):
    """Its moving mean is the right average, and something at right angles to the step."""

    def forward(self, x):
        kept = self.moving_mean.clone()
        output = super().forward(x)
        if self.training:
            step = self.moving_mean - kept
            beside = step.roll(1) - (step.roll(1) @ step) / (step @ step) * step
            self.moving_mean.add_(beside)
        return output


class Codebook(nn.Module):
    """Keeps a running mean and variance and normalizes nothing."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return x + self.running_mean.view(1, -1, 1, 1)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's: a norm by its name, and none of those that are known."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        spread = x.norm(p=2, dim=(-1, -2), keepdim=True)
        nx = spread / (spread.mean(1, keepdim=True) + 1e-6)
        return x + self.weight.view(1, -1, 1, 1) * x * nx + self.bias.view(1, -1, 1, 1)
