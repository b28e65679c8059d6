"""The data sets of the laboratory: scikit-learn's digits, which need no download, FashionMNIST and CIFAR-100.

Every set comes as float images ``(N, 1, 28, 28)``, CIFAR-100 as ``(N, 3, 32, 32)``, scaled to 0 to 1 and then
standardised by the mean and the standard deviation of all training pixels, with a fixed split into training and test
data.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..errors import ArgumentError, DataError
from ..spelling import alternatives
from .cifar import ARCHIVE, read_cifar100
from .dataset import Dataset
from .idx import read_idx
from .own import own_dataset

__all__ = ["DATASETS", "Dataset", "limited", "load", "validation_split"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_ADDRESS = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"

CIFAR_100_ADDRESS = "https://www.cs.toronto.edu/~kriz/"
CIFAR_100_MD5 = "md5:03b5dce01913d631647c71ecec9e9cb8"

# The sums that the data set's own page publishes, for the files as they are downloaded.
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
}
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Load a data set by name; a second call in the same process returns the same tensors.

    Args:
        name: ``"digits"``, ``"fashion-mnist"``, ``"cifar-100"``, or a reader's own function, ``"package.module:name"``.
        data_dir: the folder that holds the files, for a data set that is read from files.

    Raises:
        ArgumentError: the name is unknown, or ``data_dir`` was given for a data set that has no files.
        DataError: a file is missing or damaged, or could not be downloaded.

    >>> digits = load("digits")
    >>> digits.train_images.shape, digits.test_labels.shape
    (torch.Size([1437, 1, 28, 28]), torch.Size([360]))
    """
    if ":" in name:
        return _own_once(name)
    if name not in DATASETS:
        raise ArgumentError(f"unknown data set {name!r}; {alternatives(name, DATASETS)}")
    return _load_once(name, data_dir)


@lru_cache(maxsize=4)
def _load_once(name: str, data_dir: Path | None) -> Dataset:
    return DATASETS[name](data_dir)


@lru_cache(maxsize=4)
def _own_once(name: str) -> Dataset:
    return own_dataset(name)


@lru_cache(maxsize=16)
def limited(dataset: Dataset, train_images: int | None, test_images: int | None, seed: int = 0) -> Dataset:
    """Return so many training and test images, drawn by class from this seed; ``None`` keeps all of them."""
    train, test = (
        _drawn(labels, count, seed)
        for labels, count in ((dataset.train_labels, train_images), (dataset.test_labels, test_images))
    )
    return replace(
        dataset,
        whole=dataset,
        train_images=dataset.train_images[train],
        train_labels=dataset.train_labels[train],
        test_images=dataset.test_images[test],
        test_labels=dataset.test_labels[test],
        description=f"{dataset.description} Of these, {len(train)} training and {len(test)} test images are used.",
    )


def _drawn(labels: Tensor, count: int | None, seed: int) -> NDArray[np.int64]:
    """Return the indices of so many images, stratified by class; all of them where there are no more."""
    from sklearn.model_selection import train_test_split

    indices = np.arange(len(labels))
    if count is None or count >= len(labels):
        return indices
    drawn: NDArray[np.int64] = train_test_split(indices, train_size=count, stratify=labels.numpy(), random_state=seed)[
        0
    ]
    return drawn


@lru_cache(maxsize=4)
def validation_split(dataset: Dataset, share: float = 0.1) -> Dataset:
    """Return the data set with a stratified part of its training data in the place of the test data.

    Settings are chosen on this split, so that the test data have no part in the choice.
    """
    from sklearn.model_selection import train_test_split

    indices = np.arange(len(dataset.train_labels))
    kept, held_out = train_test_split(
        indices, test_size=share, stratify=dataset.train_labels.numpy(), random_state=0, shuffle=True
    )
    return replace(
        dataset,
        train_images=dataset.train_images[kept],
        train_labels=dataset.train_labels[kept],
        test_images=dataset.train_images[held_out],
        test_labels=dataset.train_labels[held_out],
        description=f"{dataset.description} A stratified {share:.0%} of the training data stands in for the test data.",
    )


def _digits(data_dir: Path | None) -> Dataset:
    """Scikit-learn's 1797 handwritten digits of 8x8 pixels, enlarged to 28x28."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if data_dir is not None:
        raise ArgumentError("digits come with scikit-learn and are read from no folder; leave --data-dir out")
    bunch = load_digits()
    small = torch.from_numpy(bunch.images.astype(np.float32) / 16.0)[:, None]
    images = functional.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    labels = bunch.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return _standardised(
        name="digits",
        images=(images[train], images[test]),
        labels=(labels[train], labels[test]),
        classes=tuple("0123456789"),
        description="scikit-learn's digits, 8x8 pixels enlarged to 28x28 (bilinear); 80 % training and 20 % test, "
        "stratified by class, the same split in every run.",
        digest=_digest(bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)),
    )


def _fashion_mnist(data_dir: Path | None) -> Dataset:
    """Zalando's 70,000 pictures of clothes in ten classes (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747)."""
    folder = data_dir or (DEBIAN_FASHION_MNIST if DEBIAN_FASHION_MNIST.is_dir() else None)
    if folder is None:
        files = {name: _download(name) for name in FASHION_MNIST_MD5}
    else:
        files = {name: _find(folder, name) for name in FASHION_MNIST_MD5}
    images = [read_idx(files[f"{part}-images-idx3-ubyte.gz"], (28, 28)) for part in ("train", "t10k")]
    labels = [read_idx(files[f"{part}-labels-idx1-ubyte.gz"], ()) for part in ("train", "t10k")]
    for part, part_images, part_labels in zip(("train", "t10k"), images, labels, strict=True):
        _check_labels(files[f"{part}-labels-idx1-ubyte.gz"], part_images, part_labels)
    scaled = [torch.from_numpy(part.astype(np.float32) / 255.0)[:, None] for part in images]
    return _standardised(
        name="fashion-mnist",
        images=(scaled[0], scaled[1]),
        labels=(labels[0].astype(np.int64), labels[1].astype(np.int64)),
        classes=FASHION_CLASSES,
        description=f"FashionMNIST (Xiao, Rasul and Vollgraf 2017), 28x28 grey; its own split: {len(labels[0])} "
        f"training and {len(labels[1])} test images. {_compared_with_published(files, FASHION_MNIST_MD5)}",
        digest=_digest(*images, *labels),
    )


def _cifar100(data_dir: Path | None) -> Dataset:
    """Krizhevsky's 60,000 colour pictures in a hundred classes (Learning multiple layers of features, 2009)."""
    advice = f"name the folder that holds {ARCHIVE}, or what is in it,"
    folder = data_dir or _fetch(CIFAR_100_ADDRESS, ARCHIVE, CIFAR_100_MD5, "cifar-100", advice).parent
    read = read_cifar100(folder)
    archive = {ARCHIVE: folder / ARCHIVE}
    scaled = [torch.from_numpy(part.astype(np.float32) / 255.0) for part in (read.train_images, read.test_images)]
    return _standardised(
        name="cifar-100",
        images=(scaled[0], scaled[1]),
        labels=(read.train_labels.astype(np.int64), read.test_labels.astype(np.int64)),
        classes=read.classes,
        description=f"CIFAR-100 (Krizhevsky 2009), 32x32 in colour, a hundred classes; its own split: "
        f"{len(read.train_labels)} training and {len(read.test_labels)} test images. "
        f"{_compared_with_published(archive, {ARCHIVE: CIFAR_100_MD5})}",
        digest=_digest(read.train_images, read.test_images, read.train_labels, read.test_labels),
    )


def _standardised(
    *,
    name: str,
    images: tuple[Tensor, Tensor],
    labels: tuple[NDArray[np.int64], NDArray[np.int64]],
    classes: tuple[str, ...],
    description: str,
    digest: str,
) -> Dataset:
    """Subtract the mean of all training pixels and divide by their standard deviation."""
    train, test = images
    # In float64: the mean of 47 million float32 pixels would hang on the number of threads.
    mean, std = train.double().mean(), train.double().std()
    if std == 0:
        raise DataError(f"{name}: all training pixels have the same value; expected images")
    return Dataset(
        name=name,
        train_images=(train - mean.float()) / std.float(),
        train_labels=torch.from_numpy(labels[0]),
        test_images=(test - mean.float()) / std.float(),
        test_labels=torch.from_numpy(labels[1]),
        classes=classes,
        description=f"{description} Pixels from 0 to 1, standardised by the training pixels' mean and deviation.",
        digest=digest,
    )


def _compared_with_published(files: Mapping[str, Path], published: Mapping[str, str]) -> str:
    """Say whether files have the sums that the data set's page publishes, which are those of the packed files."""
    if any(path.name != name or not path.is_file() for name, path in files.items()):
        return "Its files are unpacked: the published sums are of the packed ones, and cannot be checked."
    sums = {name: hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() for name, path in files.items()}
    other = [name for name, md5 in sums.items() if published[name] != f"md5:{md5}"]
    if other:
        return f"Not the published files, but packed anew or altered: {', '.join(other)} (by their MD5 sums)."
    return "Its files have the published MD5 sums."


def _find(folder: Path, name: str) -> Path:
    """Return the file in the folder, gzipped or unpacked."""
    for candidate in (folder / name, folder / name.removesuffix(".gz")):
        if candidate.is_file():
            return candidate
    expected = ", ".join(FASHION_MNIST_MD5)
    raise DataError(f"{folder / name}: no such file; expected in this folder, gzipped or unpacked: {expected}")


def _download(name: str) -> Path:
    """Fetch one file of FashionMNIST."""
    advice = "install Debian's package dataset-fashion-mnist, or name the folder that holds"
    return _fetch(
        FASHION_MNIST_ADDRESS,
        name,
        FASHION_MNIST_MD5[name],
        "fashion-mnist",
        f"{advice} {', '.join(FASHION_MNIST_MD5)}",
    )


def _fetch(address: str, name: str, checksum: str, folder: str, advice: str) -> Path:
    """Fetch a file into the user's cache, once, and check its sum."""
    import pooch

    try:
        fetched = pooch.retrieve(address + name, checksum, fname=name, path=pooch.os_cache("normkit") / folder)
    except (OSError, ValueError) as error:
        raise DataError(f"{address}{name}: could not be downloaded ({error}); {advice} with --data-dir") from error
    return Path(fetched)


def _check_labels(path: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    if len(images) != len(labels):
        raise DataError(f"{path}: {len(labels)} labels for {len(images)} images; expected as many of each")
    if labels.max() > 9:
        raise DataError(f"{path}: label {labels.max()} found; expected 0 to 9")


def _digest(*arrays: NDArray[np.uint8]) -> str:
    """Return one SHA-256 over the bytes of all arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


DATASETS: Mapping[str, Callable[[Path | None], Dataset]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar-100": _cifar100,
}
