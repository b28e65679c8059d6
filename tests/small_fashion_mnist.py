"""FashionMNIST in miniature: the same four files, a few random images in each."""

import gzip
from pathlib import Path

import numpy as np


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_small_fashion_mnist(folder: Path, train: int = 130, test: int = 40, packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(7)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        # Each class is bright in its own row, so that there is something to learn.
        images = generator.integers(0, 60, (count, 28, 28))
        images[np.arange(count), labels * 2 + 3] += 150
        for stem, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            content = idx_bytes(array)
            if packed:
                (folder / f"{stem}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / stem).write_bytes(content)
    return folder
