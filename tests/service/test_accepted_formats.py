"""Which image formats the service takes, over each form of a request: those of its list, and no others."""

import base64

import pytest
from support import assert_problem, encode, photo, serving

from service.config import Settings

FILES = {kind: encode(photo(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")}


def forms_of(kind: str) -> dict[str, dict]:
    file = FILES[kind]
    return {
        "raw": {"content": file, "headers": {"content-type": f"image/{kind.lower()}"}},
        "raw without a type": {"content": file},
        "multipart": {"files": {"file": ("photo", file)}},
        "json": {"json": {"images": [base64.b64encode(file).decode()]}},
    }


@pytest.mark.parametrize("kind", FILES)
def test_every_format_gets_the_same_answer_in_each_form_of_a_request(ask, kind):
    answers = [ask("POST", "/predict?logits=true", **one) for one in forms_of(kind).values()]
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(FILES[kind]).decode()]}
    v2 = ask("POST", "/v2/models/tiny/infer", json={"inputs": [tensor]})

    logits = [one.json()["predictions"][0]["logits"] for one in answers]
    assert logits == [v2.json()["outputs"][0]["data"]] * len(answers)


def test_the_list_of_formats_is_a_setting_and_no_other_is_taken(models):
    with serving(Settings(models=models, device="cpu", formats=("PNG", "BMP"))) as ask:
        told = ask("GET", "/info").json()["formats"]
        for kind, file in FILES.items():
            answer = ask("POST", "/predict", content=file)
            if kind in told:
                assert answer.status_code == 200
            else:
                assert "PNG, BMP" in assert_problem(answer, 415, "unsupported-format")["detail"]

    assert told == ["PNG", "BMP"]
