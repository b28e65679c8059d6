"""Layers beside batch normalization, each with one fault, and the words by which the report must name it."""

import torch
from torch.nn import functional as F

import normkit
from normkit import functional


class PapersAlpha(normkit.LocalResponseNorm):
    def forward(self, x):
        return F.local_response_norm(x, self.size, self.alpha * self.size, self.beta, self.k)


class WindowMirrored(normkit.LocalResponseNorm):
    def forward(self, x):
        return super().forward(x.flip(1)).flip(1)


class IgnoresStyle(normkit.AdaptiveInstanceNorm):
    def forward(self, x, style):
        return functional.instance_norm(x, eps=self.eps)


class StyleMeanLost(normkit.AdaptiveInstanceNorm):
    def forward(self, x, style):
        return super().forward(x, style) - style.mean((2, 3), keepdim=True)


class UnbiasedStyle(normkit.AdaptiveInstanceNorm):
    def forward(self, x, style):
        # Not torch.var_mean, which warns of an empty batch, once per process.
        mean = style.mean((2, 3), keepdim=True)
        var = (style - mean).square().mean((2, 3), keepdim=True)
        var = var * style.shape[2:].numel() / (style.shape[2:].numel() - 1)
        return functional.instance_norm(x, eps=self.eps) * (var + self.eps).sqrt() + mean


class DetachedStyle(normkit.AdaptiveInstanceNorm):
    def forward(self, x, style):
        return super().forward(x, style.detach())


class SmallRemainder(normkit.GhostBatchNorm2d):
    def forward(self, x):
        if not self.training or x.numel() == 0:
            return super().forward(x)
        parts = x.split(self.ghost_size)
        y = [F.batch_norm(part, None, None, self.weight, self.bias, True, eps=self.eps) for part in parts]
        super().forward(x)
        return torch.cat(y)


class PaddingInStatistics(normkit.MaskedBatchNorm1d):
    def forward(self, x, mask):
        return super().forward(x).masked_fill(~mask.unsqueeze(1), 0)


class PaddingAsZeros(normkit.MaskedBatchNorm1d):
    def forward(self, x, mask):
        padding = ~mask.unsqueeze(1)
        return super().forward(x.masked_fill(padding, 0)).masked_fill(padding, 0)


class PaddingNormalized(normkit.MaskedBatchNorm1d):
    def forward(self, x, mask):
        y = super().forward(x, mask)
        if not self.training or x.numel() == 0:
            return y
        valid = x.movedim(1, -1)[mask]
        var, mean = torch.var_mean(valid, 0, correction=0)
        each = [value[:, None] for value in (mean, (var + self.eps).rsqrt() * self.weight, self.bias)]
        return torch.where(mask.unsqueeze(1), y, (x - each[0]) * each[1] + each[2])


class LeftRotated(normkit.WhiteningBatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        if not self.training or x.numel() == 0:
            return y
        values = x.transpose(0, 1).flatten(1)
        _, vectors = torch.linalg.eigh(torch.cov(values, correction=0))
        shape = (1, -1, 1, 1)
        xhat = (y - self.bias.view(shape)) / self.weight.view(shape)
        rotated = torch.einsum("dc,ndhw->nchw", vectors.to(xhat.dtype), xhat)
        return rotated * self.weight.view(shape) + self.bias.view(shape)


class StoresBiasedCovariance(normkit.WhiteningBatchNorm2d):
    def forward(self, x):
        said, self.unbiased = self.unbiased, False
        try:
            return super().forward(x)
        finally:
            self.unbiased = said


class WhitensByTheBatchInEvaluation(normkit.WhiteningBatchNorm2d):
    def forward(self, x):
        groups, eps = self.num_groups, self.eps
        y = functional.whitening_batch_norm(x, None, None, self.weight, self.bias, True, eps=eps, num_groups=groups)
        if self.training:
            super().forward(x)
        return y


AS_BATCH = "averages samples and positions, as batch normalization does"
# Method, layer, spatial dimensions, and the words.
FAULTS = [
    ("response", lambda channels: PapersAlpha(3, alpha=2.0), 2, "does not divide alpha by size"),
    ("response", lambda channels: WindowMirrored(4, alpha=2.0), 2, "reaches one channel further up than down"),
    ("adaptive", IgnoresStyle, 2, "ignores the style"),
    ("adaptive", StyleMeanLost, 2, "leaves the style's mean out"),
    ("adaptive", UnbiasedStyle, 2, "takes the style's unbiased deviation"),
    ("adaptive", DetachedStyle, 2, "gives the style no gradient"),
    ("renorm", normkit.BatchNorm2d, 2, AS_BATCH),
    ("ghost", lambda channels: SmallRemainder(channels, ghost_size=4), 2, "leaves the remainder of the batch"),
    ("masked", PaddingInStatistics, 1, "lets the padding into the statistics"),
    ("masked", PaddingInStatistics, 1, "lets the padding into the output"),
    ("masked", PaddingAsZeros, 1, "counts the padding as zeros"),
    ("masked", PaddingNormalized, 1, "normalizes the padding too instead of leaving zeros"),
    ("whitening", normkit.BatchNorm2d, 2, AS_BATCH),
    ("whitening", LeftRotated, 2, "leaves the result in the basis of the eigenvectors"),
    ("whitening", StoresBiasedCovariance, 2, "stores the biased variance"),
    ("whitening", WhitensByTheBatchInEvaluation, 2, "uses the statistics of the batch in evaluation"),
]
