"""`training.comparison.trial`: what counts as diverged, and what is no trial at all."""

from dataclasses import replace

import pytest
from training_support import QUICK, Scattered

from training.architectures import ARCHITECTURES
from training.comparison.experiments import Scale
from training.comparison.trial import run_trial
from training.data import load
from training.errors import RunError

SCALE = Scale(seeds=1, images=64, evaluations=2, test_images=20)


def test_a_loss_that_is_not_finite_is_a_trial_that_diverged():
    trial = run_trial("steep", replace(QUICK, learning_rate=1e30), load(QUICK), SCALE)
    assert trial.diverged
    assert trial.steps < 4
    assert trial.final.step == trial.steps


@pytest.mark.usefixtures("_free_again")
def test_an_operation_that_is_refused_is_not_taken_for_a_trial_that_diverged(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ARCHITECTURES, "scattered", lambda *_, **__: Scattered())
    config = replace(QUICK, architecture="scattered", deterministic=True)
    with pytest.raises(RunError, match=r"put_? gives other bits from run to run"):
        run_trial("scattered", config, load(QUICK), SCALE)
