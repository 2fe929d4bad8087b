"""Image folders: layouts, splits, what cannot be decoded, worker processes, and pixels that are the service's own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_support import PHOTO_CLASSES as CLASSES
from training_support import QUICK, hush, write_photos

from service.preprocessing import decode, encode_png, from_pixels
from training.batches import Batches
from training.config import TrainConfig
from training.data import Dataset, load
from training.data.decoding import ImageFiles
from training.data.folders import folder_preprocessing, read_folder
from training.data.parts import neutral
from training.errors import DataError, UsageError
from training.run import pixel_statistics, train

CONFIG = replace(QUICK, dataset="folder:photos", size=10, validation_images=4, workers=0, batch_size=4)


def read(folder: Path, config: TrainConfig = CONFIG) -> Dataset:
    return read_folder("folder:photos", folder, config, say=hush)


@pytest.mark.parametrize("resident_mib", [2048, 0], ids=["in memory", "streamed"])
@pytest.mark.parametrize("resize", ["exact", "shorter_side"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_the_service_bit_for_bit(tmp_path: Path, resident_mib: int, resize: str, mode: str):
    folder = write_photos(tmp_path / "photos")
    dataset = read(folder, replace(CONFIG, resident_mib=resident_mib, resize=resize, mode=mode))
    assert isinstance(dataset.test.images, ImageFiles) == (resident_mib == 0)
    served = {decode(path.read_bytes(), dataset.preprocessing).tobytes() for path in folder.rglob("*.png")}
    trained = set()
    for part in (dataset.training, dataset.validation, dataset.test):
        batches = Batches.on(torch.device("cpu"), part)
        for images, _ in batches.fetch(batches.in_order()):
            trained |= {image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in images}
    assert trained == served


def test_converting_pixels_equals_decoding_a_file_of_them():
    rng = np.random.default_rng(0)
    for channels, mode in ((1, "RGB"), (3, "L"), (1, "L"), (3, "RGB")):
        pixels = rng.integers(0, 256, (28, 20, channels), dtype=np.uint8)
        wanted = neutral(mode, (32, 32))
        np.testing.assert_array_equal(from_pixels(pixels, wanted), decode(encode_png(pixels), wanted))


def test_one_tree_is_split_stratified_and_disjoint(tmp_path: Path):
    dataset = read(write_photos(tmp_path / "photos", count=20))
    assert dataset.labels == CLASSES
    parts = dataset.training, dataset.validation, dataset.test
    assert [len(part) for part in parts] == [30, 4, 6]
    assert all(np.bincount(part.targets).tolist() == [len(part) // 2] * 2 for part in parts)
    images = [image.tobytes() for part in parts for image in part.images]
    assert len(set(images)) == 40
    assert "6 test images, stratified, seed 0" in dataset.split


def test_the_test_part_of_one_tree_does_not_depend_on_the_seed(tmp_path: Path):
    folder = write_photos(tmp_path / "photos", count=20)
    first, second = read(folder), read(folder, replace(CONFIG, seed=3))
    np.testing.assert_array_equal(first.test.images, second.test.images)
    assert not np.array_equal(first.validation.images, second.validation.images)


@pytest.mark.parametrize(
    ("folders", "sizes"),
    [(("train",), [9, 2, 5]), (("train", "val"), [14, 2, 16]), (("train", "val", "test"), [16, 16, 16])],
    ids=lambda value: "+".join(map(str, value)),
)
def test_named_parts_are_used_and_what_is_missing_is_held_out(tmp_path: Path, folders, sizes):
    for seed, name in enumerate(folders):
        write_photos(tmp_path / name, seed=seed)
    dataset = read(tmp_path, replace(CONFIG, validation_images=2, test_share=0.3))
    assert [len(part) for part in (dataset.training, dataset.validation, dataset.test)] == sizes


def test_worker_processes_give_the_same_pixels_as_none(tmp_path: Path):
    folder = write_photos(tmp_path / "photos")
    alone, helped = read(folder), read(folder, replace(CONFIG, workers=2))
    np.testing.assert_array_equal(alone.training.images, helped.training.images)
    streamed = read(folder, replace(CONFIG, resident_mib=0))
    order = [np.array([3, 0]), np.array([5]), np.array([1, 1, 2])]
    batches = Batches.on(torch.device("cpu"), streamed.training, workers=2)
    for (images, targets), indices in zip(batches.fetch(order), order, strict=True):
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1), alone.training.images[indices])
        assert targets.tolist() == alone.training.targets[indices].tolist()


def test_unreadable_files_are_listed_and_counted_and_stop_the_run(tmp_path: Path):
    folder = write_photos(tmp_path / "photos")
    (folder / "cat" / "bad.jpg").write_bytes(b"\xff\xd8\xff no photo")
    (folder / "dog" / "cut.png").write_bytes((folder / "dog" / "0.png").read_bytes()[:60])
    (folder / "dog" / "notes.txt").write_text("not an image, and not meant as one")
    with pytest.raises(DataError, match=r"2 of 18 images cannot be decoded: .*bad\.jpg.*; .*cut\.png.*--skip-bad"):
        read(folder)
    told = []
    dataset = read_folder("folder:photos", folder, replace(CONFIG, skip_bad=True), say=told.append)
    assert len(dataset.skipped) == 2
    assert sum(len(part) for part in (dataset.training, dataset.validation, dataset.test)) == 16
    assert told[0].startswith("skipped 2 of 18 images")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_after_it_was_read_stops_the_run_by_name(tmp_path: Path, workers: int):
    folder = write_photos(tmp_path / "photos")
    streamed = read(folder, replace(CONFIG, resident_mib=0))
    Path(streamed.training.images.paths[2]).write_bytes(b"gone")
    batches = Batches.on(torch.device("cpu"), streamed.training, workers)
    with pytest.raises(DataError, match=r"\.png cannot be decoded"):
        list(batches.fetch([np.arange(4)]))


def test_a_file_that_is_gone_is_told_in_a_person_s_words(tmp_path: Path):
    gone = ImageFiles([tmp_path / "gone.png"], folder_preprocessing(QUICK))
    with pytest.raises(DataError, match=r"gone\.png cannot be read: No such file or directory$"):
        gone.at(0)


def test_a_class_folder_with_one_image_is_refused_by_name(tmp_path: Path):
    folder = write_photos(tmp_path / "photos")
    (folder / "owl").mkdir()
    (folder / "owl" / "1.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    with pytest.raises(DataError, match=r"owl holds 1 image; a class needs at least 3"):
        read(folder)


@pytest.mark.parametrize("beside", [("test",), ("val",), ("val", "test")], ids="+".join)
def test_a_training_folder_with_one_image_is_refused_by_name_whatever_stands_beside_it(tmp_path: Path, beside):
    for name in ("train", *beside):
        write_photos(tmp_path / name)
    for number in range(1, 8):
        (tmp_path / "train" / "cat" / f"{number}.png").unlink()
    with pytest.raises(DataError, match=r"train/cat holds 1 image; a class needs at least 2, to learn from: add"):
        read(tmp_path)


def test_a_class_of_which_too_few_can_be_decoded_is_refused_by_name(tmp_path: Path):
    folder = write_photos(tmp_path / "photos", count=4)
    for number in range(2):
        (folder / "dog" / f"{number}.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"dog holds 2 images that can be decoded; a class needs at least 3"):
        read(folder, replace(CONFIG, skip_bad=True))


def test_one_class_is_refused_by_name(tmp_path: Path):
    write_photos(tmp_path, classes=("cat",))
    with pytest.raises(DataError, match="holds one class, cat; a classifier needs a folder for each of two or more"):
        read(tmp_path)


def test_empty_folders_are_refused_by_name(tmp_path: Path):
    with pytest.raises(DataError, match=rf"{tmp_path} holds no class folders; expected"):
        read(tmp_path)
    folder = write_photos(tmp_path / "photos")
    (folder / "owl").mkdir()
    with pytest.raises(DataError, match=r"owl holds no image .*add images, or remove the folder"):
        read(folder)


def test_a_class_that_was_never_trained_is_refused_in_the_test_part(tmp_path: Path):
    write_photos(tmp_path / "train")
    write_photos(tmp_path / "test", classes=("cat", "owl"))
    with pytest.raises(DataError, match="no class owl among the training images"):
        read(tmp_path)


@pytest.mark.parametrize("standardise", [True, False])
def test_images_of_one_colour_are_refused(tmp_path: Path, standardise: bool):
    for label in CLASSES:
        (tmp_path / label).mkdir()
        for number in range(5):
            (tmp_path / label / f"{number}.png").write_bytes(encode_png(np.full((9, 9, 3), 7, np.uint8)))
    words = "folder:photos: every training image has one and the same value in channel 0; check the images"
    with pytest.raises(DataError, match=words):
        pixel_statistics(read(tmp_path), standardise=standardise)


def test_a_folder_is_looked_for_where_data_sets_lie(tmp_path: Path):
    write_photos(tmp_path / "photos")
    assert load(CONFIG, tmp_path).labels == CLASSES
    with pytest.raises(DataError, match="photos is no folder here, nor in"):
        load(CONFIG, tmp_path / "elsewhere")


def test_a_streamed_folder_trains_to_the_bits_of_one_in_memory(tmp_path: Path):
    write_photos(tmp_path / "photos")
    config = replace(CONFIG, epochs=2, flip=True, cutout=3.0, population_images=8)
    whole = train(config, tmp_path / "memory", data_dir=tmp_path, say=hush)
    streamed = train(replace(config, resident_mib=0, workers=1), tmp_path / "disk", data_dir=tmp_path, say=hush)
    assert whole["validation_accuracy"] == streamed["validation_accuracy"]
    memory, disk = ((tmp_path / name / "best.safetensors").read_bytes() for name in ("memory", "disk"))
    assert memory[-5000:] == disk[-5000:], "the tensors lie at the end; facts with times at the beginning"


def test_domains_share_size_mode_and_classes(tmp_path: Path):
    write_photos(tmp_path / "day")
    write_photos(tmp_path / "night.v2", seed=5)
    write_photos(tmp_path / "other", classes=("cat", "owl"))
    config = replace(CONFIG, dataset="folder:day+folder:night.v2", limit_images=6)
    dataset = load(config, tmp_path)
    assert dataset.domains == ("day", "night-v2")
    assert np.bincount(dataset.training.domains).tolist() == [6, 6]
    alone = dataset.of_domain("night-v2")
    assert len(alone.training) == 6
    assert set(alone.training.domains) == {1}
    with pytest.raises(DataError, match="other has other classes than day"):
        load(replace(config, dataset="folder:day+folder:other"), tmp_path)
    with pytest.raises(UsageError, match="domains = separate: dataset = folder:day is one domain"):
        load(replace(config, dataset="folder:day", domains="separate"), tmp_path)


def test_a_folder_s_digest_follows_its_files_wherever_the_folder_lies(tmp_path: Path):
    folder, streamed = write_photos(tmp_path / "one"), replace(CONFIG, resident_mib=0)
    digest = read(folder, streamed).digest()
    moved = folder.rename(tmp_path / "moved")
    assert read(moved, streamed).digest() == digest
    for photo in moved.rglob("*.png"):
        photo.write_bytes(photo.read_bytes() + b"more")
    assert read(moved, streamed).digest() != digest


def test_test_images_are_in_a_digest_where_they_are_asked_for(tmp_path: Path):
    dataset = read(write_photos(tmp_path / "photos"))
    other = replace(dataset, test=dataset.validation)
    assert other.digest() == dataset.digest()
    assert other.digest(with_test=True) != dataset.digest(with_test=True)
