"""Which version answers whom: the plan, its file, and the choice between stable and canary."""

import pytest

from service.errors import ArtifactError
from service.rollout import Plan, Rollout, read_rollout


def test_the_highest_version_that_has_no_other_part_is_stable():
    assert Rollout().plan([1, 2, 3]).stable == 3
    assert Rollout(canary=3, canary_share=0.1).plan([1, 2, 3]).stable == 2
    assert Rollout(canary=3, shadow=2).plan([1, 2, 3]).stable == 1
    assert Rollout(stable=1).plan([1, 2, 3]).stable == 1


def test_every_version_with_a_part_is_loaded():
    plan = Rollout(canary=4, shadow=5, also=(1,)).plan([1, 2, 3, 4, 5])

    assert plan.versions == {1, 3, 4, 5}


@pytest.mark.parametrize(
    "rollout, present, words",
    [
        (Rollout(stable=4), [1, 2], "version 4 is not there"),
        (Rollout(canary=9, also=(7,)), [1], "version 7, 9 is not there"),
        (Rollout(canary=1), [1], "no version left"),
        (Rollout(stable=2, shadow=2), [1, 2], "cannot be stable and canary or shadow"),
        (Rollout(canary=2, shadow=2), [1, 2], "cannot be canary and shadow"),
        (Rollout(canary_share=0.5), [1, 2], r"canary_share is 0\.5 and there is no canary"),
        (Rollout(canary_share=0.5).over(Rollout(shadow=2)), [1, 2], "there is no canary"),
        (Rollout(canary=None, canary_share=0.5).over(Rollout(canary=2)), [1, 2], "there is no canary"),
        (Rollout(shadow=2).over(Rollout(canary_share=0.5)), [1, 2], "there is no canary"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(rollout, present, words):
    with pytest.raises(ArtifactError, match=words):
        rollout.plan(present)


def test_a_share_in_the_file_ends_with_the_canary_that_a_call_ends():
    file = Rollout(stable=1, canary=2, canary_share=0.5)

    assert Rollout(canary=None).over(file).plan([1, 2]) == Plan(1)
    assert Rollout(canary_share=0.25).over(file).plan([1, 2]) == Plan(1, canary=2, canary_share=0.25)


def test_one_id_gets_one_version_and_the_share_of_all_ids_is_kept():
    plan = Plan(1, canary=2, canary_share=0.25)
    chosen = [plan.choose(f"request {index}") for index in range(4000)]

    assert chosen == [plan.choose(f"request {index}") for index in range(4000)]
    # 4000 draws of 0.25 have a deviation of √(0.25·0.75/4000) = 0.7 points; five of them
    assert chosen.count(2) / 4000 == pytest.approx(0.25, abs=5 * 0.0069)
    assert Plan(1, canary=2, canary_share=0.0).choose("any") == 1
    assert Plan(1, canary=2, canary_share=1.0).choose("any") == 2


def test_more_canary_keeps_those_who_had_it():
    ids = [f"request {index}" for index in range(500)]
    few = {one for one in ids if Plan(1, 2, 0.1).choose(one) == 2}
    many = {one for one in ids if Plan(1, 2, 0.5).choose(one) == 2}

    assert few < many


def test_a_model_without_the_file_has_the_defaults(tmp_path):
    assert read_rollout(tmp_path) == Rollout()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"stabel": 1}',
        '{"canary_share": 2}',
        '{"canary_share": NaN}',
        '{"stable": "three"}',
        '{"also": [0]}',
    ],
)
def test_a_file_that_says_something_else_is_refused_by_name(tmp_path, content):
    (tmp_path / "serving.json").write_text(content)

    with pytest.raises(ArtifactError, match=r"serving\.json"):
        read_rollout(tmp_path)


@pytest.mark.parametrize(
    ("entry", "instead"), [("also", r"\[\] is no other version"), ("canary_share", "0 is no share")]
)
def test_null_where_it_says_nothing_is_refused_with_what_to_write_instead(tmp_path, entry, instead):
    (tmp_path / "serving.json").write_text(f'{{"{entry}": null}}')

    with pytest.raises(ArtifactError, match=rf"{entry}: null is for canary and shadow alone; {instead}, or leave it"):
        read_rollout(tmp_path)


def test_a_name_that_is_not_known_is_told_with_the_nearest(tmp_path):
    (tmp_path / "serving.json").write_text('{"stabel": 1}')

    with pytest.raises(
        ArtifactError, match=r"stabel: it is not known \(did you mean stable\?\); known are stable, canary"
    ):
        read_rollout(tmp_path)
