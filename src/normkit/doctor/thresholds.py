"""Every limit that a check compares with, and where it comes from.

The limits of drift were measured on a small digit network of four layers: healthy training leaves the 99th percentile
of z below 0.1 and of the log ratio below 0.2, a batch of 8 below 0.5 both, and a network that lost half its accuracy
passes 1 in 7 % of its channels. Averages over channels hide such a network, so no check takes one alone.

The limits of a layer's error and of all layers' together were measured on a residual network of six layers. Averaged
weights with old statistics, which cost 4 to 17 points of accuracy, have errors of 0.12 to 0.30 in each layer and of 0.4
to 0.55 together; a training at a constant rate 0.02 to 0.09 in each; one whose rate falls to nothing 0.
"""

import math

__all__ = [
    "ABSORBED_RATIO",
    "BATCH_SIZE_SMALL",
    "BATCH_TOLERANCE",
    "BATCH_TOLERANCE_ERROR",
    "BATCH_TOLERANCE_LOW_PRECISION",
    "CHANNEL_LOG_RATIO",
    "CHANNEL_Z",
    "CONDITION_LIMIT",
    "CONSTANT_LIMIT",
    "DEAD_BIAS",
    "DEAD_FILTER",
    "DEAD_PARAMETERS_SHARE",
    "DEAD_SHARE",
    "DEAD_VARIANCE",
    "DEAD_WEIGHT",
    "DRIFT_ERROR",
    "DRIFT_ERROR_ALONE",
    "DRIFT_ERROR_LARGE",
    "DRIFT_ERROR_MODERATE",
    "DRIFT_LOG_RATIO",
    "DRIFT_SHARE",
    "DRIFT_Z",
    "DROPOUT_LOG_RATIO",
    "EPS_FELT",
    "FALSE_ALARMS",
    "FROZEN_LOG_RATIO",
    "FROZEN_Z",
    "GAP_LARGE",
    "HALF_LARGEST",
    "MANY_LAYERS",
    "MOMENTUM_LARGE",
    "PADDING_LOG_RATIO",
    "PADDING_SHARE",
    "PADDING_SPREAD",
    "PADDING_UNMOVED",
    "RANK_ERROR",
    "RANK_WARNING",
    "RESIDUE_ERROR",
    "RESIDUE_WARNING",
    "SAMPLES_FOR_SPREAD",
    "SAMPLES_WANTED",
    "SCALE_OUTLIER",
    "VALUES_EFFECTIVE_SMALL",
    "VALUES_SMALL",
]

DRIFT_Z = 0.5  # |running mean - population mean| in standard deviations of the population
DRIFT_LOG_RATIO = 1.0  # |log2| of the running variance over the population's
DRIFT_SHARE = 0.05  # of a layer's channels beyond either: an error
CHANNEL_Z = 1.0  # the same of one channel alone, in a layer of any width
CHANNEL_LOG_RATIO = 2.0
# Root mean square over channels of what surely off statistics move a normalized value by, in its own deviations; of
# several layers the root of the sum of squares, as independent errors add on their way through a network.
DRIFT_ERROR_MODERATE = 0.15  # of a layer: it counts
DRIFT_ERROR = 0.3  # of all that count, together, two or more: a warning
DRIFT_ERROR_ALONE = 0.5  # of one layer, where only one counts: a warning
DRIFT_ERROR_LARGE = 1.0  # an error
FALSE_ALARMS = 0.01  # chance of one by sampling alone, over all channels and layers of a model together
SAMPLES_WANTED = 1000  # standard error of a mean 0.03 standard deviations, of a variance 4.5 %
# Of a layer that was frozen before weights that still learn: those adapt to it, so that only what no training leaves
# behind is said aloud.
FROZEN_Z = 1.0
FROZEN_LOG_RATIO = 2.0
GAP_LARGE = 0.05  # of the samples, right in training and wrong in evaluation: an error
ABSORBED_RATIO = 0.5  # spread over channels, of weights times deviations over weights and of shifts over biases

BATCH_TOLERANCE_ERROR = 1e-2  # relative L2 difference of one sample alone and in company
BATCH_TOLERANCE = 1e-5  # float32 on a CPU
BATCH_TOLERANCE_LOW_PRECISION = 1e-3  # CUDA, TF32 and half: kernels differ by this much innocently

BATCH_SIZE_SMALL = 8  # samples per device; below it accuracy falls with the batch size (Wu and He 2018)
VALUES_SMALL = 16  # below it the variance of a batch is off by more than 37 %, sqrt(2 / (n - 1))
SAMPLES_FOR_SPREAD = 32  # with fewer the spread over samples is itself a guess
VALUES_EFFECTIVE_SMALL = 8  # independent values whose variance would vary as much over batches as the measured one

MOMENTUM_LARGE = 0.5  # a memory of under two batches
RESIDUE_WARNING = 0.01  # share of the initial 0 and 1 that is still in the running statistics
RESIDUE_ERROR = 0.1

DEAD_VARIANCE = 0.01  # times eps, and times the layer's median: a tenth of the deviation is left
EPS_FELT = 10.0  # times eps: below it eps takes more than 5 % of the deviation
DEAD_SHARE = 0.01  # of a layer's channels
DEAD_WEIGHT = 1e-3  # times the layer's median weight: the channel says nothing beside the others
DEAD_BIAS = 10.0  # deviations below zero: before a ReLU no value comes through (1 in 1e23 of normal ones)
DEAD_PARAMETERS_SHARE = 0.1  # of a layer's channels dead by their weight or bias: a warning
DEAD_FILTER = 0.01  # of the layer's median filter, by the largest weight
SCALE_OUTLIER = 100.0  # times the layer's median scale: such a channel ruins quantization per tensor

HALF_LARGEST = 65504.0
CONDITION_LIMIT = math.sqrt(2.0**23)  # |mean| / std at which a one-pass float32 variance is all rounding: 2,896
CONSTANT_LIMIT = 1e7  # |mean| of a constant channel beyond which rounding is amplified to visible outputs

PADDING_SHARE = 0.05
PADDING_SPREAD = 0.1
PADDING_LOG_RATIO = 0.5
PADDING_UNMOVED = 1e-5  # standard deviations that the output before the padding moves when padding is added

DROPOUT_LOG_RATIO = 0.5  # |log2| of the variance with dropout over the one without

MANY_LAYERS = 4  # so many with one cause are one finding; fewer are shown one by one, to be compared

RANK_WARNING = 0.1  # largest difference between ranks, in standard deviations
RANK_ERROR = 0.5
