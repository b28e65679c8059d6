"""What a data set is, for those that read one and those that train on it."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Dataset"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Images and labels, ready to train on.

    Attributes:
        name: the word that ``--data`` takes.
        train_images: float32 ``(N, 1, 28, 28)``, or ``(N, 3, 32, 32)`` in colour, standardised.
        train_labels: int64 ``(N,)``.
        test_images: as the training images, standardised by the training pixels' mean and deviation.
        test_labels: as the training labels.
        classes: what each label stands for.
        description: where the data came from and how they were prepared, in a sentence or two.
        digest: SHA-256 of pixels and labels as they were read, for the record of a run.
        whole: the data set that this one was drawn from; ``None`` where nothing was drawn.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    description: str
    digest: str
    whole: "Dataset | None" = None
