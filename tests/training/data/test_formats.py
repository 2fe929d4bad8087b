"""CIFAR-10's binary records and SVHN's MATLAB files: read as published, refused by name where they are damaged."""

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from training_support import QUICK, idx_bytes, idx_files, idx_source, write_idx

from training import data
from training.data import cifar, load, svhn
from training.data.cifar import CifarSource, read_cifar
from training.errors import DataError

SMALL = CifarSource(images_per_file=4)
NAMES = (*cifar.TRAINING_FILES, *cifar.TEST_FILES)


def cifar_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (len(NAMES), 4, cifar.RECORD), dtype=np.uint8)
    records[:, :, 0] = rng.integers(0, 10, (len(NAMES), 4))
    return {name: one.tobytes() for name, one in zip(NAMES, records, strict=True)}


def write_cifar(folder: Path, contents: dict[str, bytes]) -> Path:
    below = folder / "cifar-10-batches-bin"
    below.mkdir(parents=True)
    for name, content in contents.items():
        (below / name).write_bytes(content)
    return folder


def packed(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_cifar_planes_become_channels_and_the_first_byte_the_label(tmp_path: Path):
    contents = cifar_files()
    training, test = read_cifar([tmp_path / "nowhere", write_cifar(tmp_path, contents)], SMALL)
    assert (training.images.shape, test.images.shape) == ((20, 32, 32, 3), (4, 32, 32, 3))
    record = np.frombuffer(contents["data_batch_2.bin"], np.uint8).reshape(4, -1)[1]
    assert training.targets[5] == record[0]
    for channel in range(3):
        plane = record[1 + 1024 * channel : 1 + 1024 * (channel + 1)].reshape(32, 32)
        np.testing.assert_array_equal(training.images[5, :, :, channel], plane)


def test_the_published_archive_is_read_without_unpacking(tmp_path: Path):
    contents = cifar_files()
    content = packed(contents)
    (tmp_path / SMALL.archive).write_bytes(content)
    source = replace(SMALL, md5=hashlib.md5(content).hexdigest())
    archived, _ = read_cifar([tmp_path], source)
    plain, _ = read_cifar([write_cifar(tmp_path / "plain", contents)], SMALL)
    np.testing.assert_array_equal(archived.images, plain.images)
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz is damaged: its MD5"):
        read_cifar([tmp_path], SMALL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[:-1], r"data_batch_3\.bin is damaged: 12,291 bytes, expected 12,292"),
        (lambda content: b"\x0b" + content[1:], r"data_batch_3\.bin: label 11 is out of range, there are 10 classes"),
    ],
    ids=["cut short", "label"],
)
def test_a_damaged_cifar_file_is_refused_by_name(tmp_path: Path, change, words: str):
    contents = cifar_files()
    contents["data_batch_3.bin"] = change(contents["data_batch_3.bin"])
    with pytest.raises(DataError, match=words):
        read_cifar([write_cifar(tmp_path, contents)], SMALL)


def test_the_pickled_cifar_is_not_touched(tmp_path: Path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="the binary version, not the pickled one"):
        read_cifar([tmp_path], SMALL)


def write_svhn(folder: Path, **changed: np.ndarray) -> dict[str, str]:
    rng = np.random.default_rng(1)
    sums = {}
    for name, count in (("train_32x32.mat", 30), ("test_32x32.mat", 10)):
        content = {
            "X": rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8),
            "y": (np.arange(count) % 10 + 1).reshape(-1, 1).astype(np.uint8),
        }
        savemat(folder / name, {**content, **changed})
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return sums


def test_svhns_ten_is_the_digit_zero(tmp_path: Path):
    sums = write_svhn(tmp_path)
    training, test = svhn.read_svhn([tmp_path], sums)
    assert training.images.shape == (30, 32, 32, 3)
    assert training.targets[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    from scipy.io import loadmat

    np.testing.assert_array_equal(test.images[7], loadmat(tmp_path / "test_32x32.mat")["X"][..., 7])


@pytest.mark.parametrize("label", [0, 11])
def test_an_svhn_label_out_of_range_is_refused(tmp_path: Path, label: int):
    sums = write_svhn(tmp_path, y=np.full((30, 1), label, np.uint8))
    with pytest.raises(DataError, match=rf"train_32x32\.mat: label {label} is out of range, expected 1 to 10"):
        svhn.read_svhn([tmp_path], sums)


def test_damaged_svhn_files_are_refused_by_name(tmp_path: Path):
    sums = write_svhn(tmp_path)
    with pytest.raises(DataError, match=r"train_32x32\.mat is damaged: its MD5"):
        svhn.read_svhn([tmp_path])
    garbage = b"MATLAB 5.0 MAT-file, or so it says" + bytes(200)
    (tmp_path / "test_32x32.mat").write_bytes(garbage)
    sums["test_32x32.mat"] = hashlib.md5(garbage).hexdigest()
    with pytest.raises(DataError, match=r"test_32x32\.mat is not a MATLAB file with X and y"):
        svhn.read_svhn([tmp_path], sums)


def test_svhn_that_is_missing_names_its_files(tmp_path: Path):
    with pytest.raises(DataError, match=r"svhn is not in .*train_32x32\.mat and test_32x32\.mat"):
        load(replace(QUICK, dataset="svhn"), tmp_path)


@pytest.mark.parametrize(("stem", "size"), [("train-labels-idx1-ubyte", 30), ("t10k-labels-idx1-ubyte", 9)])
def test_an_idx_label_out_of_range_is_refused_by_file(tmp_path: Path, monkeypatch, stem: str, size: int):
    contents = {**idx_files(), stem: idx_bytes(np.arange(size) % 4)}
    monkeypatch.setitem(data.IDX_SOURCES, "tiny", idx_source(contents))
    write_idx(tmp_path / "tiny", contents)
    with pytest.raises(DataError, match=rf"{stem}: label 3 is out of range, there are 3 classes"):
        load(replace(QUICK, dataset="tiny", validation_images=3), tmp_path)
