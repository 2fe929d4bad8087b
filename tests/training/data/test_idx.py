"""`training.data`: what is split how, and what becomes of files that are missing or damaged."""

import gzip
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_support import IDX_STEMS, QUICK, idx_bytes, idx_files, idx_source, real_data, write_idx

from training.config import TrainConfig
from training.data import IDX_SOURCES, Split, dataset_names, find_idx, hold_out, load, read_idx
from training.errors import DataError, UsageError

VALUES = np.arange(2 * 3 * 4).reshape(2, 3, 4)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_packed_or_plain(tmp_path: Path, packed):
    path = tmp_path / ("values.gz" if packed else "values")
    path.write_bytes(gzip.compress(idx_bytes(VALUES)) if packed else idx_bytes(VALUES))
    values = read_idx(path)
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values, VALUES)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x08", "not an IDX file"),
        (b"\x89PNG" + bytes(40), "not an IDX file"),
        (b"\x00\x00\x0d" + idx_bytes(VALUES)[3:], "not an IDX file"),  # floats
        (idx_bytes(VALUES)[:-1], "truncated"),
        (idx_bytes(VALUES)[:9], "truncated"),
        (idx_bytes(VALUES)[:5], "truncated"),
        (idx_bytes(VALUES) + b"\x00", "truncated"),
    ],
    ids=["empty", "short", "wrong magic", "floats", "a byte short", "no values", "half a header", "a byte long"],
)
def test_a_damaged_idx_file_is_refused_by_name(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "train-images"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"train-images is .*{reason}|train-images {reason}"):
        read_idx(path)


@pytest.mark.parametrize(
    "content",
    [b"no gzip at all", gzip.compress(idx_bytes(VALUES))[:-9], gzip.compress(idx_bytes(VALUES))[:12] + bytes(30)],
    ids=["not gzip", "cut short", "garbage inside"],
)
def test_a_damaged_gzip_file_is_refused_by_name(tmp_path: Path, content: bytes):
    path = tmp_path / "values.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"values\.gz cannot be read"):
        read_idx(path)


def test_content_that_was_not_published_is_refused(tmp_path: Path):
    contents = idx_files()
    changed = contents[IDX_STEMS[0]][:-1] + bytes([contents[IDX_STEMS[0]][-1] ^ 1])
    path = tmp_path / "images"
    path.write_bytes(changed)
    assert len(read_idx(path)) == 30
    with pytest.raises(DataError, match="another sha256"):
        read_idx(path, idx_source(contents).sha256[IDX_STEMS[0]])


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 2**31 - 1),
)
def test_holding_out_is_complete_disjoint_stratified_and_seeded(counts: list[int], share: float, seed: int):
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    total = len(targets)
    split = Split(np.arange(total, dtype=np.uint8).reshape(total, 1, 1, 1), targets)  # each image is its own number
    count = int(share * total)
    kept, held = hold_out(split, count, seed)
    assert len(held) == count
    assert sorted([*kept.images.ravel(), *held.images.ravel()]) == list(range(total))
    for part in (kept, held):
        np.testing.assert_array_equal(part.targets, targets[part.images.ravel()])
    # ranks spread each class evenly over 0–1, so below any threshold a class has its share to within half an image;
    # the threshold itself moves by as much for every class together
    for target, size in enumerate(counts):
        assert abs((held.targets == target).sum() - size * count / total) <= 1 + 0.5 * len(counts)
    np.testing.assert_array_equal(hold_out(split, count, seed)[1].images, held.images)


def test_another_seed_holds_out_other_images():
    split = Split(np.zeros((100, 1, 1, 1), np.uint8), np.zeros(100, np.int64))
    split = replace(split, images=np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1))
    assert not np.array_equal(hold_out(split, 20, 0)[1].images, hold_out(split, 20, 1)[1].images)


def test_holding_out_equal_classes_takes_equally_many_of_each():
    split = Split(np.zeros((100, 1, 1, 1), np.uint8), np.repeat(np.arange(10), 10))
    assert np.bincount(hold_out(split, 30, 5)[1].targets).tolist() == [3] * 10


@pytest.mark.parametrize("count", [10, 11])
def test_holding_out_everything_is_refused(count: int):
    with pytest.raises(DataError, match=f"cannot hold {count} images out of 10"):
        hold_out(Split(np.zeros((10, 1, 1, 1), np.uint8), np.zeros(10, np.int64)), count, 0)


def test_digits_come_in_three_parts_of_8_by_8_gray_bytes():
    dataset = load(QUICK)
    parts = dataset.training, dataset.validation, dataset.test
    assert [len(part) for part in parts] == [137, 1300, 360]
    for part in parts:
        assert (part.images.shape[1:], part.images.dtype, part.targets.dtype) == ((8, 8, 1), np.uint8, np.int64)
        assert set(part.targets) == set(range(10))
    assert max(part.images.max() for part in parts) == 255, "ink counts of 16 become white"
    assert dataset.labels == tuple("0123456789")


def test_the_test_part_of_digits_does_not_depend_on_the_seed():
    first, second = load(QUICK), load(replace(QUICK, seed=7))
    np.testing.assert_array_equal(first.test.images, second.test.images)
    assert not np.array_equal(first.validation.images, second.validation.images)


def test_an_unknown_dataset_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"mnsit is not known \(did you mean mnist\?\)"):
        load(replace(QUICK, dataset="mnsit"))


def test_each_known_dataset_is_digits_or_has_four_checksums():
    assert set(dataset_names()) == {"digits", "cifar10", "svhn", *IDX_SOURCES}
    assert all(tuple(source.sha256) == IDX_STEMS for source in IDX_SOURCES.values())


def test_missing_data_says_where_it_was_looked_for_and_what_to_do(tmp_path: Path):
    with pytest.raises(DataError, match=r"--data-dir.*--download") as caught:
        load(replace(QUICK, dataset="mnist"), tmp_path / "mine")
    assert str(tmp_path / "mine" / "mnist") in str(caught.value)
    assert str(tmp_path / "state" / "data" / "mnist") in str(caught.value)


@pytest.mark.parametrize("below", ["small", "."], ids=["in a folder of its name", "in the folder itself"])
@pytest.mark.parametrize("packed", [True, False])
def test_data_is_found(tmp_path: Path, below: str, packed):
    contents = idx_files()
    folder = write_idx(tmp_path / below, contents, packed=packed)
    found = find_idx("small", idx_source(contents), [tmp_path / "nowhere", tmp_path], download=False)
    assert found.resolve() == folder.resolve()


def test_a_folder_with_a_file_missing_is_passed_over(tmp_path: Path):
    contents = idx_files()
    (write_idx(tmp_path, contents) / f"{IDX_STEMS[3]}.gz").unlink()
    with pytest.raises(DataError, match="is not in"):
        find_idx("small", idx_source(contents), [tmp_path], download=False)


def test_files_of_another_set_that_lie_flat_in_the_folder_are_not_taken(tmp_path: Path):
    mine, other = idx_files(), {**idx_files(seed=1), IDX_STEMS[1]: idx_bytes(np.arange(30)[::-1] % 3)}
    write_idx(tmp_path, other)
    with pytest.raises(DataError, match="small is not in"):
        find_idx("small", idx_source(mine), [tmp_path], download=False)
    assert find_idx("other", idx_source(other), [tmp_path], download=False) == tmp_path


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Leave standard error alone."""


@pytest.fixture
def published(tmp_path: Path):
    """A folder that is served on loopback, and its address."""
    folder = tmp_path / "published"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_download_is_checked_kept_and_found_again(tmp_path: Path, published):
    folder, url = published
    contents = idx_files()
    write_idx(folder, contents)
    source = idx_source(contents, url)
    found = find_idx("small", source, [tmp_path / "nowhere"], download=True)
    assert found == tmp_path / "state" / "data" / "small"
    assert sorted(path.name for path in found.iterdir()) == sorted(f"{stem}.gz" for stem in IDX_STEMS)
    for stem in IDX_STEMS:
        read_idx(found / f"{stem}.gz", source.sha256[stem])
    assert find_idx("small", source, [tmp_path / "state" / "data"], download=False) == found


@pytest.mark.parametrize("stem", [IDX_STEMS[0], IDX_STEMS[3]])
def test_a_damaged_download_is_refused_and_never_used(tmp_path: Path, published, stem: str):
    folder, url = published
    contents = idx_files()
    write_idx(folder, contents)
    write_idx(folder, {stem: contents[stem][:-1] + b"\xff"})
    source = idx_source(contents, url)
    with pytest.raises(DataError, match="another sha256"):
        find_idx("small", source, [tmp_path / "nowhere"], download=True)
    with pytest.raises(DataError, match="is not in"):
        find_idx("small", source, [tmp_path / "state" / "data"], download=False)


def test_a_download_that_is_not_there_is_refused_with_its_address(tmp_path: Path, published):
    _, url = published
    with pytest.raises(DataError, match=rf"{url}/{IDX_STEMS[0]}\.gz.*404"):
        find_idx("small", idx_source(idx_files(), url), [tmp_path / "nowhere"], download=True)


def test_a_download_folder_that_cannot_be_made_is_refused(tmp_path: Path, published):
    folder, url = published
    contents = idx_files()
    write_idx(folder, contents)
    (tmp_path / "state").write_text("a file is in the way")
    with pytest.raises(DataError, match="state"):
        find_idx("small", idx_source(contents, url), [tmp_path / "nowhere"], download=True)


REAL_DATA = real_data()


@pytest.mark.skipif(REAL_DATA is None, reason="FOLDSERVE_DATA names no folder of real data")
@pytest.mark.parametrize("name", sorted(IDX_SOURCES))
def test_the_published_files_have_the_published_sizes(name: str):
    config = TrainConfig(dataset=name, architecture="small_cnn", epochs=1)
    dataset = load(config, REAL_DATA)
    assert [len(part) for part in (dataset.training, dataset.validation, dataset.test)] == [55_000, 5_000, 10_000]
    assert dataset.test.images.shape == (10_000, 28, 28, 1)
    assert len(dataset.labels) == len(set(dataset.test.targets)) == 10
