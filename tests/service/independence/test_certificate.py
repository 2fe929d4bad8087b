"""What a certificate's digest covers, and which stored ones are believed."""

import json
import os
import resource
import shutil
import threading
from pathlib import Path

import pytest
from independence_support import BRIEF, FaultyEngine, facts_of, tiny_subject

from service.engine import Shape
from service.independence.certificate import (
    Certificate,
    CertificateStore,
    CostRecord,
    Measured,
    ShapeRecord,
    TheoremRecord,
)
from service.independence.certify import certify

MEASURED = Measured(
    created="2031-01-01T00:00:00+00:00",
    seconds=77.5,
    comparisons=5,
    costs=(CostRecord(shape=ShapeRecord(batch_size=1, threads=1), seconds=1.0),),
)
THEOREM = TheoremRecord(
    version=1,
    statement="other",
    premise="other",
    layers=1,
    tightest_layer="other",
    headroom_bits=1.0,
    execution="twin",
    images=8,
)
OTHER = {
    "schema_version": 2,
    "verdict": "refused",
    "reason": "other",
    "model": "other",
    "version": 9,
    "model_digest": "0",
    "form": "exact",
    "proof": None,
    "theorem": THEOREM,
    "probe": None,
    "reference": None,
    "shapes": (),
    "reference_digest": "0",
    "sentinel_digest": "0",
    "fingerprint": {},
    "answer_digest": "0",
}


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return certify(tiny_subject(engine=FaultyEngine()), CertificateStore(None), effort=BRIEF)


@pytest.fixture
def kept(certificate, tmp_path) -> Path:
    """The file of a certificate that was saved."""
    CertificateStore(tmp_path).save(certificate)
    return next(tmp_path.rglob("*.json"))


def found(certificate: Certificate, state: Path) -> Certificate | None:
    return CertificateStore(state).find(certificate.fingerprint)


def test_the_digest_leaves_out_what_is_only_measured(certificate):
    assert certificate.model_copy(update={"measured": MEASURED}).digest == certificate.digest


@pytest.mark.parametrize("name", OTHER)
def test_the_digest_covers_everything_else(certificate, name):
    assert certificate.model_copy(update={name: OTHER[name]}).digest != certificate.digest


def test_every_field_is_either_measured_or_covered():
    assert set(OTHER) | {"measured"} == set(Certificate.model_fields)


def test_a_saved_certificate_is_found_whole(certificate, kept, tmp_path):
    assert found(certificate, tmp_path) == certificate
    assert kept.stem == certificate.fingerprint_digest
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_one_that_was_never_saved_is_not_found_and_that_is_no_warning(certificate, tmp_path, caplog):
    assert found(certificate, tmp_path) is None
    assert caplog.text == ""


def test_without_a_state_folder_none_is_kept(certificate):
    store = CertificateStore(None)
    store.save(certificate)

    assert store.find(certificate.fingerprint) is None


@pytest.mark.parametrize("name", sorted(set(OTHER) - {"schema_version"}))
def test_an_edited_certificate_is_not_believed(certificate, kept, tmp_path, caplog, name):
    stored = json.loads(kept.read_text())
    stored["certificate"][name] = THEOREM.model_dump() if name == "theorem" else OTHER[name]
    kept.write_text(json.dumps(stored))

    assert found(certificate, tmp_path) is None
    assert "not believed" in caplog.text


def test_an_edited_certificate_with_its_digest_made_again_is_not_believed_for_another_fingerprint(
    certificate, kept, tmp_path, caplog
):
    other = certificate.model_copy(update={"fingerprint": {**certificate.fingerprint, "numpy": "0"}})
    CertificateStore(tmp_path).save(other)
    shutil.copy(kept.with_name(f"{other.fingerprint_digest}.json"), kept)

    assert found(certificate, tmp_path) is None
    assert "another machine" in caplog.text


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_certificate_is_not_believed(certificate, kept, tmp_path, caplog, share):
    content = kept.read_bytes()
    kept.write_bytes(content[: int(share * len(content))])

    assert found(certificate, tmp_path) is None
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize(
    "content", [b"null", b"[]", b"\xff\xfe\x00", b"{}", b'{"digest": 1}', b"[" * 100_000], ids=range(6)
)
def test_a_file_that_is_no_certificate_is_not_believed(certificate, kept, tmp_path, content):
    kept.write_bytes(content)

    assert found(certificate, tmp_path) is None


def test_a_folder_in_the_place_of_a_certificate_is_not_believed(certificate, kept, tmp_path):
    kept.unlink()
    kept.mkdir()

    assert found(certificate, tmp_path) is None
    CertificateStore(tmp_path).save(certificate)


def leaves(facts: object, path: tuple = ()) -> list[tuple]:
    """Return the path of every single fact, empty containers included."""
    inside = facts.items() if isinstance(facts, dict) else enumerate(facts) if isinstance(facts, list) else ()
    deeper = [leaf for key, value in inside for leaf in leaves(value, (*path, key))]
    return deeper or [path]


def changed(facts: dict[str, object], path: tuple) -> dict[str, object]:
    copy = json.loads(json.dumps(facts))
    place = copy
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    place[path[-1]] = (not old) if isinstance(old, bool) else old + 1 if isinstance(old, int) else f"{old} changed"
    return copy


def test_each_fact_of_a_real_fingerprint_voids_the_certificate_when_it_changes(certificate, tmp_path):
    facts = facts_of(tiny_subject())
    store = CertificateStore(tmp_path)
    store.save(certificate.model_copy(update={"fingerprint": facts}))
    assert store.find(facts) is not None

    believed = [path for path in leaves(facts) if store.find(changed(facts, path)) is not None]

    assert len(leaves(facts)) > 30
    assert believed == []


def test_a_fact_more_or_less_voids_it_too(certificate, tmp_path):
    store = CertificateStore(tmp_path)
    store.save(certificate)
    facts = certificate.fingerprint

    assert store.find({**facts, "gpu": "none"}) is None
    assert all(store.find({name: facts[name] for name in facts if name != gone}) is None for gone in facts)


@pytest.mark.parametrize("file", ["state", "state/certificates"])
def test_a_file_in_the_place_of_the_state_folder_only_warns(certificate, tmp_path, caplog, file):
    blocked = tmp_path / file
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("a file")
    store = CertificateStore(tmp_path / "state")

    store.save(certificate)

    assert "could not be kept" in caplog.text
    assert store.find(certificate.fingerprint) is None
    assert blocked.read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_only_warns(certificate, tmp_path, caplog):
    tmp_path.chmod(0o500)
    CertificateStore(tmp_path / "state").save(certificate)
    tmp_path.chmod(0o700)

    assert "could not be kept" in caplog.text


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no folders")
def test_a_file_system_that_takes_nothing_only_warns(certificate, caplog):
    CertificateStore(Path("/proc/self/state")).save(certificate)

    assert "could not be kept" in caplog.text


def test_a_full_disk_only_warns_and_leaves_nothing_half_written(certificate, tmp_path, caplog):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))  # Python ignores SIGXFSZ: the write fails instead
    try:
        CertificateStore(tmp_path).save(certificate)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    assert "could not be kept" in caplog.text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_reader_never_meets_half_a_certificate_while_several_write(certificate, tmp_path, caplog):
    """Containers that share a state folder have the same process number, so it makes no file name theirs alone."""
    store, done = CertificateStore(tmp_path), threading.Event()
    store.save(certificate)
    missed: list[int] = []

    def read() -> None:
        while not done.is_set():
            if store.find(certificate.fingerprint) != certificate:
                missed.append(1)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=lambda: [store.save(certificate) for _ in range(40)]) for _ in range(4)]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()

    assert missed == []
    assert caplog.text == ""


def test_shapes_become_records_and_shapes_again():
    assert ShapeRecord.of(Shape(3, 2)).shape == Shape(3, 2)
