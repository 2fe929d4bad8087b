"""`foldserve compare`: end to end on the bundled digits, stopped and gone on with, and what it refuses."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from training_support import write_photos

from foldserve.cli import main
from training.comparison import experiments
from training.comparison.experiments import EXPERIMENTS, Scale
from training.comparison.results import Spread, final_accuracy, seconds_to, steps_to
from training.comparison.trial import Look, Trial
from training.config import TrainConfig

TINY = [
    "--set", "dataset=digits", "--set", "validation_images=200", "--set", "batch_size=32", "--set", "device=cpu",
    "--seeds", "2", "--images", "128", "--evaluations", "2", "--test-images", "100",
]  # fmt: skip
DOMAINS = [
    "--set", "dataset=digits+folder:negative", "--set", "size=8", "--set", "mode=L", "--set", "validation_images=200",
    "--set", "workers=0", "--set", "device=cpu",
]  # fmt: skip


def compare(*arguments: object) -> int:
    """Run the command; return its exit code."""
    return main(["compare", *map(str, arguments)])


def norms(folder: Path) -> int:
    """Compare two of the norms on a few digits."""
    return compare("norms", *TINY, "--variant", "batch", "--variant", "none", "--out", folder)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison; not to be written to."""
    folder = tmp_path_factory.mktemp("compared")
    assert norms(folder) == 0
    return folder


def test_a_comparison_writes_table_pictures_and_page(compared: Path):
    names = {path.name for path in compared.iterdir()}
    assert names == {"trials", "comparison.csv", "norms.png", "norms-seconds.png", "norms.html"}
    assert (compared / "norms.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = list(csv.DictReader((compared / "comparison.csv").read_text().splitlines()))
    assert [(row["variant"], row["seed"], row["step"]) for row in rows] == [
        (variant, seed, step) for variant in ("batch", "none") for seed in "01" for step in "24"
    ]


def test_the_page_holds_everything_and_asks_nobody(compared: Path):
    page = (compared / "norms.html").read_text()
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)', page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", page))
    assert "batch" in page
    assert "steps to 98%" in page
    assert "<td>dataset</td><td>digits</td>" in page, "what is held still is what was run, not the preset's own"
    assert "<td>norm</td>" not in page, "what is varied is not held still"


def test_what_was_run_is_kept_and_only_the_rest_is_run(compared: Path, tmp_path: Path, capsys):
    folder = tmp_path / "comparison"
    (folder / "trials").mkdir(parents=True)
    kept = sorted((compared / "trials").iterdir())
    for path in kept[:3]:  # as if stopped before the fourth
        (folder / "trials" / path.name).write_bytes(path.read_bytes())
    stamps = {path.name: path.stat().st_mtime_ns for path in (folder / "trials").iterdir()}
    capsys.readouterr()
    assert norms(folder) == 0
    out = capsys.readouterr().out
    assert "1 of 4 trials to run" in out
    assert len(re.findall(r"after 4 steps", out)) == 1
    assert {path.name for path in (folder / "trials").iterdir()} == {path.name for path in kept}
    assert all((folder / "trials" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    accuracy = [[look["accuracy"] for look in json.loads(path.read_text())["looks"]] for path in kept]
    again = [[look["accuracy"] for look in json.loads((folder / "trials" / p.name).read_text())["looks"]] for p in kept]
    assert again == accuracy, "a trial run later is the trial that would have been run"


def test_another_scale_or_key_is_another_trial(compared: Path, tmp_path: Path, capsys):
    (tmp_path / "trials").symlink_to(compared / "trials")
    capsys.readouterr()
    assert compare("norms", *TINY, "--seeds", 1, "--images", 64, "--variant", "none", "--out", tmp_path) == 0
    assert "1 of 1 trial to run" in capsys.readouterr().out


def test_a_trial_on_other_images_is_another_trial(tmp_path: Path, capsys):
    photos = write_photos(tmp_path / "photos")
    arguments = [*TINY, "--set", "dataset=folder:photos", "--set", "size=8", "--set", "validation_images=4"]
    arguments += ["--set", "batch_size=4", "--set", "workers=0", "--seeds", "1", "--images", "8", "--variant", "none"]
    told = []
    for change in (None, None, photos / "cat" / "0.png"):
        if change is not None:
            change.write_bytes((photos / "cat" / "1.png").read_bytes())
        assert compare("norms", *arguments, "--data-dir", tmp_path, "--out", tmp_path / "out") == 0
        told.append(capsys.readouterr().out.splitlines()[0].partition(" trial")[0])
    assert told == ["1 of 1", "0 of 1", "1 of 1"]


def test_a_sweep_is_drawn_over_what_was_varied(tmp_path: Path):
    scale = ["--seeds", 1, "--images", 64]
    variants = ["--variant", "decay-0.9", "--variant", "decay-0.999"]
    assert compare("decay", *TINY, *scale, *variants, "--out", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"trials", "comparison.csv", "decay.png", "decay.html"}
    page = (tmp_path / "decay.html").read_text()
    assert "with corrected statistics" in page
    assert "Each variant: 1 seed, 64 training images shown, looked at 2 times on at most 100 test images." in page


def test_of_two_domains_each_is_looked_at_apart(tmp_path: Path, domain_data: Path):
    scale = ["--seeds", 1, "--images", 256, "--evaluations", 2, "--test-images", 50]
    code = compare("domains", *DOMAINS, *scale, "--data-dir", domain_data, "--out", tmp_path)
    assert code == 0
    rows = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert [row["variant"] for row in rows] == ["union"] * 2 + ["batches"] * 2 + ["separate"] * 2
    for row in rows:
        of_domains = [float(row["digits"]), float(row["negative"])]
        assert float(row["accuracy"]) == pytest.approx(sum(of_domains) / 2)
        assert all((50 * one) % 1 == pytest.approx(0, abs=1e-9) for one in of_domains), "50 images of each"
    page = (tmp_path / "domains.html").read_text()
    assert re.search("<th>digits</th><th>negative</th>", page)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_preset_trains_each_of_its_variants_in_a_dry_run(
    name: str, tmp_path: Path, domain_data: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    changes = DOMAINS if name == "domains" else TINY[:4]
    code = compare(name, *changes, "--set", "device=cpu", "--data-dir", domain_data, "--quick", "--dry-run")
    assert code == 0
    chosen = EXPERIMENTS[name]
    assert f"takes {chosen.quick.seeds * len(chosen.variants)} trials of " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_a_schedule_ends_with_its_trial_however_many_epochs_that_is(tmp_path: Path):
    longer = ["--seeds", 1, "--images", 1237 * 8, "--evaluations", 1, "--set", "schedule=linear"]
    assert EXPERIMENTS["norms"].base.epochs == 1, "of the schedule that is not the trial's own"
    assert compare("norms", *TINY, *longer, "--variant", "batch", "--out", tmp_path) == 0
    (trial,) = (json.loads(path.read_text()) for path in (tmp_path / "trials").iterdir())
    assert trial["looks"][-1]["accuracy"] > 0.9, "past its end a linear schedule would go below 0 and unlearn"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["norm"], r"norm is not a comparison \(did you mean norms\?\)"),
        (["norms", "--variant", "bach"], r"--variant bach is not there \(did you mean batch\?\)"),
        (["norms", "--seeds", "0"], "--seeds 0: expected at least 1"),
        (["norms", "--set", "seed=3"], "--seeds says how many"),
        (["norms", "--set", "optimiser=sgd"], r"did you mean optimizer\?"),
        (["norms", "--set", "dataset=digit"], r"did you mean digits\?"),
    ],
    ids=str,
)
def test_what_a_person_did_wrong_is_one_line(tmp_path: Path, monkeypatch, capsys, arguments: list[str], words: str):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert len(error.splitlines()) == 1


def test_a_damaged_trial_is_named_with_the_mend(compared: Path, tmp_path: Path, capsys):
    (tmp_path / "trials").mkdir()
    for path in (compared / "trials").iterdir():
        (tmp_path / "trials" / path.name).write_text("{}")
    assert norms(tmp_path) == 1
    assert re.search(r"-seed0-.*is damaged .*; delete it", capsys.readouterr().err)


def trial(*accuracies: float, diverged: bool = False) -> Trial:
    """Return a trial that was looked at every 10 steps, a second each."""
    looks = tuple(Look(10 * (i + 1), float(i + 1), one, one) for i, one in enumerate(accuracies))
    return Trial("any", 0, 10 * len(looks), looks, diverged)


def test_steps_to_a_target_are_counted_over_the_seeds_that_reach_it():
    trials = [trial(0.9, 0.98, 0.985), trial(0.98, 0.97, 0.99), trial(0.9, 0.91, 0.92)]
    assert steps_to(0.98, trials) == Spread(15.0, pytest.approx(50**0.5), 2, 3)
    assert seconds_to(0.99, trials) == Spread(3.0, None, 1, 3)
    assert steps_to(0.98, trials).words() == "15 ± 7 (2 of 3)"
    assert steps_to(0.999, trials).words() == "not reached"
    assert final_accuracy(trials).mean == pytest.approx((0.985 + 0.99 + 0.92) / 3)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_of_every_experiment_is_a_configuration(name: str):
    chosen = EXPERIMENTS[name]
    configs = [chosen.base.with_values(variant.values) for variant in chosen.variants]
    assert all(isinstance(config, TrainConfig) for config in configs)
    assert len({variant.name for variant in chosen.variants}) == len(configs) == len({str(one) for one in configs})
    assert chosen.quick.images * chosen.quick.seeds < chosen.scale.images * chosen.scale.seeds


def test_the_sweeps_cover_what_they_promise():
    assert (min(experiments.BATCH_SIZES), max(experiments.BATCH_SIZES)) == (2, 512)
    assert np.log10(max(experiments.RATES) / min(experiments.RATES)) == pytest.approx(4)
    assert (min(experiments.DECAYS), max(experiments.DECAYS)) == (0.9, 0.999)
    assert Scale().seeds >= 5
