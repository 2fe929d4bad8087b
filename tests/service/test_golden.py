"""golden.npz: read without pickle, refused when damaged, and what it proves about model and decoder."""

import dataclasses
import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CPU, TinyModel

from service.artifact import Artifact
from service.engine import open_engine
from service.errors import ArtifactError
from service.golden import Golden

TINY = TinyModel()
GOLDEN = TINY.golden()
SPEC = TINY.spec


@pytest.fixture(scope="module")
def run():
    return open_engine(TINY.model_bytes(), CPU).run


def arrays_of(golden: Golden) -> dict[str, np.ndarray]:
    return dict(np.load(io.BytesIO(golden.to_bytes())))


def packed(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read(tmp_path, content: bytes) -> Golden:
    path = tmp_path / "golden.npz"
    path.write_bytes(content)
    return Golden.from_file(path)


def test_a_golden_file_comes_back_as_it_was(tmp_path):
    golden = read(tmp_path, GOLDEN.to_bytes())

    assert golden.encoded == GOLDEN.encoded
    assert np.array_equal(golden.pixels, GOLDEN.pixels)
    assert np.array_equal(golden.logits_float64, GOLDEN.logits_float64)
    assert golden.tolerance == GOLDEN.tolerance


def test_the_real_model_gives_its_golden_answers(run):
    assert GOLDEN.check(run, SPEC) <= GOLDEN.tolerance


def test_a_missing_golden_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"golden.npz is missing; export"):
        Golden.from_file(tmp_path / "golden.npz")


def plain_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        GOLDEN.to_bytes()[:200],
        GOLDEN.to_bytes()[:-30],
        plain_array(),
        packed(pixels=GOLDEN.pixels),
        packed(**{**arrays_of(GOLDEN), "offsets": np.array(["a", "b"])}),
        packed(**{**arrays_of(GOLDEN), "offsets": np.array([0.5, 1.5])}),
        packed(**{**arrays_of(GOLDEN), "tolerance": np.array([1.0, 2.0])}),
        packed(**{**arrays_of(GOLDEN), "pixels": np.uint8(7)}),
        packed(**{**arrays_of(GOLDEN), "logits_float64": np.float64(7)}),
        packed(**{**arrays_of(GOLDEN), "pixels": GOLDEN.pixels[..., 0]}),
    ],
    ids=[
        *("empty", "text", "cut early", "cut late", "npy", "keys", "text offsets", "float offsets", "two tolerances"),
        *("one pixel", "one logit", "no channels"),
    ],
)
def test_a_damaged_golden_file_is_refused(tmp_path, content):
    with pytest.raises(ArtifactError, match=r"golden.npz is damaged"):
        read(tmp_path, content)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_damage_to_a_golden_file_is_refused_or_harmless(tmp_path_factory, data):
    content = bytearray(GOLDEN.to_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[position] ^= data.draw(st.integers(1, 255))

    try:
        golden = read(tmp_path_factory.mktemp("golden"), bytes(content))
    except ArtifactError:
        return
    assert np.array_equal(golden.pixels, GOLDEN.pixels)  # zip's checksums guard the content


class Fuse:
    """Explodes when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("the golden file was unpickled",)


def test_a_pickle_in_a_golden_file_is_refused_and_not_run(tmp_path):
    trapped = np.array([Fuse()], dtype=object)

    with pytest.raises(ArtifactError, match="damaged"):
        read(tmp_path, packed(**{**arrays_of(GOLDEN), "pixels": trapped}))
    with pytest.raises(ArtifactError, match="damaged"):
        read(tmp_path, pickle.dumps(trapped))


@pytest.mark.parametrize("key", ["pixels", "logits_float64", "offsets"])
def test_arrays_of_different_length_are_refused(tmp_path, key):
    arrays = arrays_of(GOLDEN)

    with pytest.raises(ArtifactError, match=r"differ in length|offsets do not fit"):
        read(tmp_path, packed(**{**arrays, key: arrays[key][:-1]}))


def test_no_golden_image_at_all_is_refused(tmp_path):
    none = {"encoded": np.zeros(0, np.uint8), "offsets": np.zeros(1, np.int64), "tolerance": np.float64(1)}

    with pytest.raises(ArtifactError, match="damaged"):
        read(tmp_path, packed(**none, pixels=GOLDEN.pixels[:0], logits_float64=GOLDEN.logits_float64[:0]))


@pytest.mark.parametrize("other", [TinyModel(mode="L"), TinyModel(labels=("cat", "dog"))])
def test_the_golden_file_of_another_model_is_refused(tmp_path, other):
    folder = TINY.write(tmp_path)
    (folder / "golden.npz").write_bytes(other.golden().to_bytes())

    with pytest.raises(ArtifactError, match=r"golden.npz belongs to another model"):
        Artifact.load(folder)


def test_other_weights_fail_the_golden_images():
    other = open_engine(TinyModel(seed=2).model_bytes(), CPU)

    with pytest.raises(ArtifactError, match="logits differ by"):
        GOLDEN.check(other.run, SPEC)


def test_one_wrong_logit_of_one_image_is_enough(run):
    wrong = GOLDEN.logits_float64.copy()
    wrong[5, 1] += 3 * GOLDEN.tolerance

    with pytest.raises(ArtifactError, match="golden image 5"):
        dataclasses.replace(GOLDEN, logits_float64=wrong).check(run, SPEC)


def test_one_wrong_pixel_is_enough(run):
    wrong = GOLDEN.pixels.copy()
    wrong[3, 0, 0, 0] ^= 1

    with pytest.raises(ArtifactError, match="golden image 3 decodes to other pixels"):
        dataclasses.replace(GOLDEN, pixels=wrong).check(run, SPEC)


def test_a_golden_image_that_cannot_be_decoded_is_refused(run):
    with pytest.raises(ArtifactError, match="golden image 0 cannot be decoded"):
        dataclasses.replace(GOLDEN, encoded=(b"hello", *GOLDEN.encoded[1:])).check(run, SPEC)


def test_nan_logits_fail_the_golden_images():
    with pytest.raises(ArtifactError, match="differ by inf"):
        GOLDEN.check(lambda images: np.full((len(images), 3), np.nan, np.float32), SPEC)


@pytest.mark.parametrize("tolerance", [np.nan, np.inf, -1.0])
def test_a_tolerance_that_forgives_everything_or_nothing_is_refused(tmp_path, tolerance):
    with pytest.raises(ArtifactError):
        read(tmp_path, dataclasses.replace(GOLDEN, tolerance=tolerance).to_bytes())
