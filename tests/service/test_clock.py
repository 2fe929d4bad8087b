"""A clock that is behind what was made earlier is told; one that nothing contradicts is not."""

from datetime import UTC, datetime

import pytest

from service.clock import contradiction

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("certified", "trained", "what"),
    [
        ("2026-11-21T12:02:00+00:00", None, "certificate"),
        ("2026-11-21T14:02:00+01:00", "2026-01-01", "certificate"),
        (None, "2026-11-23", "model"),
    ],
)
def test_a_clock_behind_a_certificate_or_a_model_is_told_with_both_times(certified, trained, what):
    told = contradiction(NOW, certified=certified, trained=trained)

    assert told is not None
    assert f"its {what} was made at 2026-11-2" in told
    assert "2026-11-21T12:00:00+00:00" in told


@pytest.mark.parametrize(
    ("certified", "trained"),
    [
        ("2026-11-21T12:00:59+00:00", None),  # two machines that share a folder, a minute apart
        (None, "2026-11-22"),  # tomorrow already, further east
        ("2020-01-01T00:00:00+00:00", "2020-01-01"),
        ("yesterday", "soon"),
        (None, None),
        (None, 17),
    ],
)
def test_what_contradicts_nothing_is_not_told(certified, trained):
    assert contradiction(NOW, certified=certified, trained=trained) is None
