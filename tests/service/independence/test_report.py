"""The certificate as a table, and the demonstration with its counts."""

from pathlib import Path

import pytest
from independence_support import BRIEF, SHAPES, FaultyEngine, flip, subject, tiny_subject, training_norm
from support import CPU

from service.artifact import Artifact
from service.engine import OnnxEngine, Shape
from service.independence.certificate import CertificateStore
from service.independence.certify import Subject, certify
from service.independence.demo import THREADS, breaking_graph, demo
from service.independence.proof import prove
from service.independence.report import table

COMMITTED = Path(__file__).parents[3] / "models" / "mnist" / "1"
NOWHERE = CertificateStore(None)


def lines_of(one: Subject) -> list[str]:
    return table(certify(one, NOWHERE, effort=BRIEF)).splitlines()


def test_the_table_tells_all_that_a_person_asks():
    certificate = certify(tiny_subject(), NOWHERE, effort=BRIEF)
    text = table(certificate)

    for told in ("CERTIFIED", "tiny version 1, float form", certificate.model_digest, certificate.digest):
        assert told in text
    assert certificate.answer_digest in text
    assert f"{certificate.measured.comparisons:,} answers compared as bits" in text
    assert text.count("equal bits ") == len(SHAPES) + text.count("with equal bits ")
    assert text.count("reference") == 1


def test_every_shape_is_named_as_a_person_would():
    text = "\n".join(lines_of(tiny_subject()))

    assert all(name in text for name in ("1 image on 1 thread ", "2 images on 1 thread ", "1 image on 4 threads "))


def test_the_columns_stand_below_each_other_and_no_line_ends_in_spaces():
    lines = lines_of(tiny_subject())

    assert [line for line in lines if line != line.rstrip()] == []
    width = max(len(line.split("  ")[0]) for line in lines if line[0] != " ")
    assert {line[width : width + 2] for line in lines} == {"  "}
    assert {line[width + 2] != " " for line in lines} == {True}


def test_a_dropped_shape_stands_there_with_its_reason():
    def slot(images, _, logits):
        return flip(logits, 3) if len(images) == 4 else logits

    dropped = [line for line in lines_of(tiny_subject(engine=FaultyEngine(slot))) if "never run" in line]

    assert len(dropped) == 1
    assert "4 images on 1 thread" in dropped[0]
    assert "slot" in dropped[0]


def test_a_refusal_names_the_node_and_what_to_do():
    text = "\n".join(lines_of(subject(training_norm())))

    assert "REFUSED" in text
    assert "mixed at node norm" in text
    assert "evaluation mode" in text


def test_what_was_cut_stands_in_the_table():
    one = tiny_subject(engine=FaultyEngine())
    certificate = certify(one, NOWHERE, effort=BRIEF)
    probe = certificate.probe.model_copy(update={"cut": ("4 images instead of 256",)})

    assert "4 images instead of 256" in table(certificate.model_copy(update={"probe": probe}))


def committed() -> Subject:
    artifact = Artifact.load(COMMITTED)
    return Subject("mnist", 1, artifact, OnnxEngine(artifact.model_bytes, CPU), (*SHAPES, Shape(8, 1)))


@pytest.mark.parametrize("make", [tiny_subject, committed], ids=["tiny", "committed"])
def test_the_demonstration_shows_no_difference_here_and_one_in_the_graph_that_breaks(make):
    one = make()
    lines = list(demo(one, certify(one, NOWHERE, effort=BRIEF)))

    differing = [int(line.split(" of ")[0].replace(",", "")) for line in lines[1::2]]
    assert differing[0] == 0
    assert differing[1] > 0
    assert "in 0 of 64 images" in lines[1]
    assert f"{THREADS} threads" in lines[2]


def test_the_demonstration_counts_what_really_differs():
    class Off(FaultyEngine):
        def run(self, images, threads=1):
            logits = super().run(images, threads)
            return flip(logits, 1, 0, 2) if self.fault and len(images) == 4 else logits

    engine = Off()
    one = tiny_subject(engine=engine)
    certificate = certify(one, NOWHERE, effort=BRIEF)
    engine.fault = lambda _images, _threads, logits: logits

    assert next(line for line in demo(one, certificate) if "differ" in line) == (
        "  32 of 192 numbers differ, in 16 of 64 images"
    )


def test_a_crowd_that_does_not_divide_the_images_is_shown_too():
    one = tiny_subject((Shape(1, 1), Shape(6, 1)), FaultyEngine())

    assert "0 of 192 numbers differ" in list(demo(one, certify(one, NOWHERE, effort=BRIEF)))[1]


def test_the_graph_that_breaks_mixes_nothing():
    import onnx

    assert prove(onnx.load_model_from_string(breaking_graph())).verdict == "independent"
