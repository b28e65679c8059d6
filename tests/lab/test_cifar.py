import io
import tarfile

import numpy as np
import pytest
import torch

from normkit.errors import DataError
from normkit.lab import cifar, data
from normkit.lab.cifar import ARCHIVE, RECORD, read_cifar100
from normkit.lab.data import load

COUNTS = {"train.bin": 7, "test.bin": 3}
NAMES = [f"class_{number}" for number in range(100)]


@pytest.fixture(autouse=True)
def small_counts(monkeypatch):
    monkeypatch.setattr(cifar, "COUNTS", COUNTS)


def content_of(name):
    """Image i of class 97 - i is red with pixels i, green 100 + i, blue 200 + i, but its first pixel is 255."""
    content = b""
    for i in range(COUNTS[name]):
        planes = np.repeat(np.array([[i], [100 + i], [200 + i]], np.uint8), 1024, axis=1)
        planes[0, 0] = 255
        content += bytes([i % 20, 97 - i]) + planes.tobytes()
    return content


def files():
    return {**{name: content_of(name) for name in COUNTS}, "fine_label_names.txt": "\n".join(NAMES).encode() + b"\n"}


def write(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**files(), **changes}.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(folder, contents=None):
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
        for name, content in (contents or files()).items():
            member = tarfile.TarInfo(f"cifar-100-binary/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("form", ["folder", "folder-inside", "archive"])
def test_values_are_those_written(tmp_path, form):
    if form == "archive":
        write_archive(tmp_path)
    else:
        write(tmp_path if form == "folder" else tmp_path / "cifar-100-binary")
    read = read_cifar100(tmp_path)
    assert read.train_images.shape == (7, 3, 32, 32)
    assert read.train_labels.tolist() == [97, 96, 95, 94, 93, 92, 91]
    assert read.test_labels.tolist() == [97, 96, 95]
    assert read.train_images[4, :, 31, 31].tolist() == [4, 104, 204]
    assert read.train_images[4, :, 0, 0].tolist() == [255, 104, 204]
    assert read.classes == tuple(NAMES)


def test_archive_of_the_whole_format_agrees_with_the_files(tmp_path):
    packed, unpacked = read_cifar100(write_archive(tmp_path / "a")), read_cifar100(write(tmp_path / "b"))
    assert np.array_equal(packed.train_images, unpacked.train_images)


DAMAGE = {
    "cut": ("train.bin", lambda content: content[:-1], f"{7 * RECORD} bytes .*, {7 * RECORD - 1} found"),
    "record-missing": ("test.bin", lambda content: content[:-RECORD], "cut short"),
    "empty": ("test.bin", lambda content: b"", "0 found"),
    "too-long": ("test.bin", lambda content: content + b"x", "bytes follow"),
    "class": ("train.bin", lambda content: content[: 2 * RECORD + 1] + b"\x64" + content[2 * RECORD + 2 :],
              "image 2 has the class 100, expected 0 to 99"),
    "superclass": ("train.bin", lambda content: b"\x14" + content[1:], "image 0 has the superclass 20"),
    "names": ("fine_label_names.txt", lambda content: b"apple\n", "1 names found, expected 100"),
    "names-binary": ("fine_label_names.txt", lambda content: b"\xff" * 9, "not text"),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["files", "archive"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_its_file(tmp_path, kind, packed):
    name, change, message = DAMAGE[kind]
    damaged = {name: change(files()[name])}
    folder = write_archive(tmp_path, {**files(), **damaged}) if packed else write(tmp_path, **damaged)
    with pytest.raises(DataError, match=message) as caught:
        read_cifar100(folder)
    assert name in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no CIFAR-100 here; expected train.bin, test.bin, fine_label_names.txt, or"):
        read_cifar100(tmp_path)
    (write(tmp_path) / "test.bin").unlink()
    with pytest.raises(DataError, match=r"test\.bin: no such file"):
        read_cifar100(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.98])
def test_archive_cut_short_is_named(tmp_path, keep):
    path = write_archive(tmp_path) / ARCHIVE
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=f"{ARCHIVE}: (damaged or cut short|holds no)"):
        read_cifar100(tmp_path)


def test_archive_without_a_file_is_named(tmp_path):
    contents = files()
    del contents["test.bin"]
    with pytest.raises(DataError, match=r"holds no test\.bin"):
        read_cifar100(write_archive(tmp_path, contents))


def test_data_set_is_standardised_colour_with_its_own_split(tmp_path):
    dataset = load("cifar-100", write(tmp_path))
    assert dataset.train_images.shape == (7, 3, 32, 32)
    assert dataset.train_images.dtype == torch.float32
    assert abs(dataset.train_images.double().mean()) < 1e-6
    assert abs(dataset.train_images.double().std() - 1) < 1e-5
    assert dataset.test_labels.tolist() == [97, 96, 95]
    assert dataset.classes[97] == "class_97"


def test_download_that_fails_says_what_to_do_instead(monkeypatch):
    import pooch

    asked = {}

    def refuse(address, known_hash, **options):
        asked.update(address=address, known_hash=known_hash)
        raise OSError("no network")

    monkeypatch.setattr(pooch, "retrieve", refuse)
    data._load_once.cache_clear()
    with pytest.raises(DataError, match=r"no network.*--data-dir"):
        load("cifar-100")
    assert asked["address"].endswith(f"/{ARCHIVE}")
    assert asked["known_hash"].startswith("md5:")
