import gzip
from collections import Counter

import numpy as np
import pytest
import torch

from normkit.errors import ArgumentError, DataError
from normkit.lab import data
from normkit.lab.data import load, validation_split
from normkit.lab.idx import read_idx
from small_fashion_mnist import idx_bytes, write_small_fashion_mnist

IMAGES = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 251


def test_read_idx_returns_the_values_written(tmp_path):
    (tmp_path / "plain").write_bytes(idx_bytes(IMAGES))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx_bytes(IMAGES)))
    assert np.array_equal(read_idx(tmp_path / "plain", (28, 28)), IMAGES)
    assert np.array_equal(read_idx(tmp_path / "packed.gz", (28, 28)), IMAGES)


def damaged(change):
    content = bytearray(idx_bytes(IMAGES))
    return bytes(change(content))


def replaced(content, position, value):
    content[position] = value
    return content


DAMAGE = {
    "empty": (lambda content: b"", "a header of 16 bytes expected, 0 found"),
    "header-cut": (lambda content: content[:10], "a header of 16 bytes expected, 10 found"),
    "first-byte": (lambda content: replaced(content, 0, 1), "expected 00 00 08 03"),
    "type-float": (lambda content: replaced(content, 2, 0x0D), "expected 00 00 08 03"),
    "dimensions": (lambda content: replaced(content, 3, 1), "expected 00 00 08 03"),
    "height": (lambda content: replaced(content, 11, 27), r"items of shape \(27, 28\), expected \(28, 28\)"),
    "no-items": (lambda content: replaced(content, 7, 0), "announces 0 items"),
    "absurd-count": (lambda content: replaced(content, 4, 255), "announces 4278190083 items"),
    "cut-short": (lambda content: content[:-1], "2352 bytes expected after the header, 2351 found"),
    "too-long": (lambda content: content + b"x", "bytes follow the 2352"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", DAMAGE)
def test_read_idx_names_the_file_and_what_was_expected_when_damaged(tmp_path, name, packed):
    change, message = DAMAGE[name]
    path = tmp_path / ("images.gz" if packed else "images")
    path.write_bytes(gzip.compress(damaged(change)) if packed else damaged(change))
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, (28, 28))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_read_idx_names_a_gzip_file_cut_short(tmp_path, keep):
    packed = gzip.compress(idx_bytes(IMAGES))
    path = tmp_path / "images.gz"
    path.write_bytes(packed[: int(len(packed) * keep)])
    with pytest.raises(DataError, match="damaged or cut short") as caught:
        read_idx(path, (28, 28))
    assert str(path) in str(caught.value)


def test_read_idx_names_a_gzip_file_with_a_flipped_byte(tmp_path):
    packed = bytearray(gzip.compress(idx_bytes(IMAGES)))
    packed[-6] ^= 1
    (tmp_path / "images.gz").write_bytes(packed)
    with pytest.raises(DataError, match="damaged or cut short"):
        read_idx(tmp_path / "images.gz", (28, 28))


def test_read_idx_names_a_file_that_is_no_gzip_or_a_folder(tmp_path):
    (tmp_path / "images.gz").write_bytes(idx_bytes(IMAGES))
    with pytest.raises(DataError, match="damaged or cut short"):
        read_idx(tmp_path / "images.gz", (28, 28))
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path, (28, 28))


def test_digits_are_standardised_and_split_by_class():
    digits = load("digits")
    assert digits.train_images.dtype == torch.float32
    assert digits.train_images.double().mean().abs() < 1e-6
    assert abs(digits.train_images.double().std() - 1) < 1e-6
    counts = Counter(digits.test_labels.tolist())
    assert set(counts) == set(range(10))
    assert max(counts.values()) - min(counts.values()) <= 3
    assert len(digits.train_labels) + len(digits.test_labels) == 1797


def test_digits_refuse_a_folder(tmp_path):
    with pytest.raises(ArgumentError, match="leave --data-dir out"):
        load("digits", tmp_path)


def test_unknown_data_set_lists_the_known_ones():
    with pytest.raises(ArgumentError, match="'mnist'; known are: digits, fashion-mnist"):
        load("mnist")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_fashion_mnist_is_read_from_the_folder_given(tmp_path, packed):
    dataset = load("fashion-mnist", write_small_fashion_mnist(tmp_path, packed=packed))
    assert dataset.train_images.shape == (130, 1, 28, 28)
    assert dataset.test_labels.tolist() == [i % 10 for i in range(40)]
    assert abs(dataset.train_images.double().std() - 1) < 1e-6


def test_fashion_mnist_names_a_missing_file_and_falls_back_on_nothing(tmp_path):
    folder = write_small_fashion_mnist(tmp_path)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz: no such file; expected .*train-images-idx3"):
        load("fashion-mnist", folder)


def test_fashion_mnist_names_labels_that_do_not_fit(tmp_path):
    folder = write_small_fashion_mnist(tmp_path)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.arange(129) % 10)))
    with pytest.raises(DataError, match="129 labels for 130 images"):
        load("fashion-mnist", folder)


def test_fashion_mnist_names_a_label_above_nine(tmp_path):
    folder = write_small_fashion_mnist(tmp_path)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.arange(130) % 11)))
    with pytest.raises(DataError, match="label 10 found; expected 0 to 9"):
        load("fashion-mnist", folder)


def test_fashion_mnist_names_images_of_one_colour(tmp_path):
    folder = write_small_fashion_mnist(tmp_path)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.full((130, 28, 28), 9))))
    with pytest.raises(DataError, match="same value"):
        load("fashion-mnist", folder)


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("hash does not match")], ids=["network", "checksum"])
def test_fashion_mnist_download_failure_says_what_to_do(tmp_path, monkeypatch, error):
    import pooch

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(DataError, match=f"could not be downloaded .{error}.; .*--data-dir"):
        data._fashion_mnist(None)


def test_fashion_mnist_download_asks_for_the_published_sums(tmp_path, monkeypatch):
    import pooch

    folder = write_small_fashion_mnist(tmp_path)
    asked = {}

    def retrieve(url, known_hash, fname, path):
        asked[url.rpartition("/")[2]] = known_hash
        return str(folder / fname)

    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert len(data._fashion_mnist(None).train_labels) == 130
    assert asked == data.FASHION_MNIST_MD5


def test_validation_split_takes_nothing_from_the_test_data():
    digits = load("digits")
    split = validation_split(digits)
    assert len(split.train_labels) + len(split.test_labels) == len(digits.train_labels)
    rows = {image.numpy().tobytes() for image in digits.train_images}
    assert all(image.numpy().tobytes() in rows for image in split.test_images)
    assert set(split.test_labels.tolist()) == set(range(10))


def test_files_of_a_folder_are_held_against_the_published_sums(tmp_path):
    folder = write_small_fashion_mnist(tmp_path / "small")
    assert (
        "Not the published files, but packed anew or altered: train-images-idx3-ubyte.gz"
        in load("fashion-mnist", folder).description
    )
    for path in list(folder.glob("*.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    data._load_once.cache_clear()
    unpacked = load("fashion-mnist", folder).description
    assert "unpacked: the published sums are of the packed ones, and cannot be checked" in unpacked
