"""The benchmark that imports the public zoo takes minutes: what it needs is asked for before."""

import sys

import pytest

from benchmarks.zoo_import import main


def test_a_page_to_write_is_asked_for_before_anything_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["zoo_import", "--timeout-s", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "--out is missing" in capsys.readouterr().err
