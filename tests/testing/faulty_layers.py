"""A batch normalization that is right, and one subclass for every way to get it wrong."""

import torch
from torch import Tensor, nn


class Sound(nn.Module):
    """Plain and right; each step is a method, so that a fault is one override."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.eps, self.momentum = channels, 1e-5, 0.1
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.make_buffers()

    def make_buffers(self) -> None:
        self.register_buffer("running_mean", torch.zeros(self.channels))
        self.register_buffer("running_var", torch.ones(self.channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if x.numel() == 0:
            return x.clone()
        if self.training:
            mean, var = self.statistics(x.double())
            with torch.no_grad():
                self.update(mean.flatten(), var.flatten(), x.numel() / x.shape[1])
        else:
            mean, var = self.stored(x)
        return self.finish(self.normalize(x.double(), mean, var), x)

    def check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"expected {self.channels} channels, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected floating point, got {x.dtype}")
        if self.training and x.numel() == x.shape[1]:
            raise ValueError("one value per channel")

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        first = x.detach()[:1]
        for axis in range(2, x.dim()):
            first = first.narrow(axis, 0, 1)
        offset = (x - first).mean(axes, keepdim=True)
        return first + offset, (x - first - offset).square().mean(axes, keepdim=True)

    def update(self, mean: Tensor, var: Tensor, count: float) -> None:
        self.running_mean += self.momentum * (mean - self.running_mean)
        self.running_var += self.momentum * (var * count / (count - 1) - self.running_var)
        self.num_batches_tracked += 1

    def stored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.spread(self.running_mean, x), self.spread(self.running_var, x)

    def spread(self, value: Tensor, x: Tensor) -> Tensor:
        return value.reshape(1, -1, *(1 for _ in range(2, x.dim())))

    def normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (x - mean) / (var + self.eps).sqrt()

    def finish(self, xhat: Tensor, x: Tensor) -> Tensor:
        return (xhat * self.spread(self.weight, x) + self.spread(self.bias, x)).to(x.dtype)


class UnbiasedForward(Sound):
    def normalize(self, x, mean, var):
        count = x.numel() / x.shape[1] if self.training else float("inf")
        return (x - mean) / (var / (1 - 1 / count) + self.eps).sqrt()


class EpsOutside(Sound):
    def normalize(self, x, mean, var):
        return (x - mean) / (var.sqrt() + self.eps)


class OtherEps(Sound):
    def normalize(self, x, mean, var):
        return (x - mean) / (var + 1e-3).sqrt()


class DividesByVariance(Sound):
    def normalize(self, x, mean, var):
        return (x - mean) / (var + self.eps)


class KeepsMean(Sound):
    def normalize(self, x, mean, var):
        return x / (var + self.eps).sqrt()


class ReversedMomentum(Sound):
    def update(self, mean, var, count):
        self.running_mean += (1 - self.momentum) * (mean - self.running_mean)
        self.running_var += (1 - self.momentum) * (var * count / (count - 1) - self.running_var)
        self.num_batches_tracked += 1


class StoresBiased(Sound):
    def update(self, mean, var, count):
        super().update(mean, var * (count - 1) / count, count)


class StoresDeviation(Sound):
    def update(self, mean, var, count):
        super().update(mean, var.sqrt() * (count - 1) / count, count)


class ScalesStoredMean(Sound):
    def update(self, mean, var, count):
        super().update(mean * count / (count - 1), var, count)


class StoresLastBatch(Sound):
    def update(self, mean, var, count):
        self.running_mean.copy_(mean)
        self.running_var.copy_(var * count / (count - 1))
        self.num_batches_tracked += 1


class NeverUpdates(Sound):
    def update(self, mean, var, count):
        self.num_batches_tracked += 1


class NeverCounts(Sound):
    def update(self, mean, var, count):
        super().update(mean, var, count)
        self.num_batches_tracked -= 1


class BatchInEvaluation(Sound):
    def stored(self, x):
        return self.statistics(x.double())


class UpdatesInEvaluation(Sound):
    def stored(self, x):
        result = tuple(value.clone() for value in super().stored(x))
        mean, var = self.statistics(x.double())
        with torch.no_grad():
            self.update(mean.flatten(), var.flatten(), x.numel() / x.shape[1])
        return result


class StoredVarianceAsDeviation(Sound):
    def stored(self, x):
        mean, var = super().stored(x)
        return mean, var.square()


class DetachedStatistics(Sound):
    def statistics(self, x):
        return tuple(value.detach() for value in super().statistics(x))


class DetachedMean(Sound):
    def statistics(self, x):
        mean, var = super().statistics(x)
        return mean.detach(), var


class DetachedVariance(Sound):
    def statistics(self, x):
        mean, var = super().statistics(x)
        return mean, var.detach()


class FrozenWeight(Sound):
    def finish(self, xhat, x):
        return (xhat * self.spread(self.weight, x).detach() + self.spread(self.bias, x)).to(x.dtype)


class IgnoresBias(Sound):
    def finish(self, xhat, x):
        return (xhat * self.spread(self.weight, x)).to(x.dtype)


class OnePlusWeight(Sound):
    def finish(self, xhat, x):
        return (xhat * (1 + self.spread(self.weight, x)) + self.spread(self.bias, x)).to(x.dtype)


class EveryPosition(Sound):
    def statistics(self, x):
        return x.mean(0, keepdim=True), x.var(0, correction=0, keepdim=True)

    def update(self, mean, var, count):
        self.num_batches_tracked += 1


class EachSample(Sound):
    def statistics(self, x):
        axes = tuple(range(2, x.dim()))
        return x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)

    def update(self, mean, var, count):
        self.num_batches_tracked += 1


class DifferenceOfSquares(Sound):
    def forward(self, x):
        self.check(x)
        if x.numel() == 0:
            return x.clone()
        if not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        mean = x.mean(axes, keepdim=True)
        var = (x.square().mean(axes, keepdim=True) - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.update(mean.flatten(), var.flatten(), x.numel() / x.shape[1])
        return self.finish(self.normalize(x, mean, var), x)


class HalfStatistics(Sound):
    def statistics(self, x):
        mean, var = super().statistics(x)
        half = self.weight.dtype if self.weight.dtype == torch.bfloat16 else torch.float64
        return mean.to(half).double(), var.to(half).double()


class AlwaysFloat(Sound):
    def finish(self, xhat, x):
        return super().finish(xhat, x.float())


class WritesInput(Sound):
    def forward(self, x):
        y = super().forward(x)
        with torch.no_grad():
            x.copy_(y)
        return y.clone()


class AcceptsOtherChannels(Sound):
    def check(self, x):
        if x.dim() < 2 or not x.is_floating_point() or (self.training and x.numel() == x.shape[1]):
            raise ValueError("bad")

    def update(self, mean, var, count):
        super().update(mean.expand(self.channels), var.expand(self.channels), count)


class ChangesThenFails(Sound):
    def check(self, x):
        self.num_batches_tracked += 1
        super().check(x)
        self.num_batches_tracked -= 1


class AcceptsOneValue(Sound):
    def check(self, x):
        if x.dim() < 2 or x.shape[1] != self.channels or not x.is_floating_point():
            raise ValueError("bad")


class StoresEmptyBatch(Sound):
    def forward(self, x):
        if x.dim() > 1 and x.numel() == 0:
            self.running_mean.zero_().sub_(1)
            return x.clone()
        return super().forward(x)


class OutsideStateDict(Sound):
    def make_buffers(self):
        super().make_buffers()
        self.register_buffer("running_var", torch.ones(self.channels), persistent=False)


class WrongStrides(Sound):
    def forward(self, x):
        self.check(x)
        size, stride = x.shape, torch.empty(x.shape, device="meta").stride()
        return super().forward(x.detach().as_strided(size, stride) if not x.is_contiguous() else x)


class InterleavedGroups(nn.GroupNorm):
    def forward(self, x):
        order = torch.arange(self.num_channels).reshape(-1, self.num_groups).T.flatten()
        xhat = nn.functional.group_norm(x[:, order], self.num_groups, eps=self.eps)[:, order.argsort()]
        shape = (1, -1, *(1 for _ in range(2, x.dim())))
        return xhat * self.weight.reshape(shape) + self.bias.reshape(shape)


class LeakyLayerNorm(nn.LayerNorm):
    def forward(self, x):
        xhat = nn.functional.layer_norm(x, self.normalized_shape, eps=self.eps)
        return xhat * self.weight + self.bias + 1e-3 * (x.mean(0, keepdim=True) - x.mean())


# Each fault, and the words by which the report must name it.
FAULTS = {
    UnbiasedForward: "normalizes with the unbiased variance",
    EpsOutside: "adds eps to the deviation, outside the root",
    OtherEps: "uses eps=0.001 where it says 1e-05",
    DividesByVariance: "divides by the variance instead of its root",
    KeepsMean: "does not remove the mean",
    ReversedMomentum: "weights the old value by momentum",
    StoresBiased: "stores the biased variance",
    StoresDeviation: "stores the deviation, not the variance",
    ScalesStoredMean: "stores the mean times m / (m - 1)",
    StoresLastBatch: "stores the last batch alone",
    NeverUpdates: "does not update its running statistics",
    NeverCounts: "does not count its batches",
    BatchInEvaluation: "uses the statistics of the batch in evaluation",
    UpdatesInEvaluation: "updates its statistics in evaluation",
    StoredVarianceAsDeviation: "takes the running variance for a deviation",
    DetachedStatistics: "treats mean and variance as constants in the backward",
    DetachedMean: "treats the mean as a constant in the backward",
    DetachedVariance: "treats the variance as a constant in the backward",
    FrozenWeight: "gives the weight no gradient",
    IgnoresBias: "ignores the bias",
    OnePlusWeight: "multiplies by 1 + weight",
    EveryPosition: "averages the samples only, each position by itself",
    EachSample: "averages the positions only, each sample by itself",
    DifferenceOfSquares: "loses its digits to a large mean",
    HalfStatistics: "rounds to half precision before the end",
    AlwaysFloat: "changes the type of what it is given",
    WritesInput: "writes into its input",
    AcceptsOtherChannels: "accepts a wrong number of channels",
    ChangesThenFails: "changes its state in a forward that fails",
    AcceptsOneValue: "accepts one value per channel in training",
    StoresEmptyBatch: "stores an empty batch",
    OutsideStateDict: "keeps statistics outside its state dict",
    WrongStrides: "reads memory in an order that the strides do not have",
}
