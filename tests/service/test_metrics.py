"""What /metrics shows, read by Prometheus's own parser."""

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import TinyModel, random_pixels, spec_for

from service.manifest import Manifest, PixelStatistics
from service.metrics import Metrics
from service.postprocessing import top_k


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Return every sample by its name and its labels' values."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def test_requests_are_counted_by_route_code_and_reason():
    metrics = Metrics()
    for code, reason in ((200, "ok"), (200, "ok"), (415, "unsupported-format")):
        metrics.request("/predict", code, reason)

    seen = samples(metrics)

    assert seen["foldserve_http_requests_total", "200", "ok", "/predict"] == 2
    assert seen["foldserve_http_requests_total", "415", "unsupported-format", "/predict"] == 1


def test_readiness_and_device_are_gauges():
    metrics = Metrics()
    metrics.device("auto", "cpu")
    metrics.ready(True)
    assert samples(metrics)["foldserve_ready",] == 1
    metrics.ready(False)

    assert samples(metrics)["foldserve_ready",] == 0
    assert samples(metrics)["foldserve_device_info", "auto", "cpu"] == 1


def test_a_model_is_told_with_version_form_and_digest():
    metrics = Metrics()
    metrics.model("tiny", 3, "float", "abc")

    assert samples(metrics)["foldserve_model_info", "abc", "float", "tiny", "3"] == 1


def test_batches_and_their_waiting_times_are_histograms():
    metrics = Metrics()
    tiny = metrics.model("tiny", 1, "float", "abc")
    tiny.ran(3, [0.1, 0.2, 0.3], 0.05)

    seen = samples(metrics)

    assert seen["foldserve_batch_size_sum", "tiny", "1"] == 3
    assert seen["foldserve_batch_size_count", "tiny", "1"] == 1
    assert seen["foldserve_stage_duration_seconds_count", "tiny", "queue", "1"] == 3
    assert seen["foldserve_stage_duration_seconds_sum", "tiny", "infer", "1"] == 0.05


def test_a_model_that_only_runs_as_a_shadow_does_holds_few_durations():
    metrics = Metrics()
    shadow = metrics.model("tiny", 2, "float", "abc")
    for _ in range(2000):
        shadow.ran(1, [0.1], 0.05)

    assert sum(len(one._held) for one in shadow._tallies) < 1000
    assert samples(metrics)["foldserve_stage_duration_seconds_count", "tiny", "queue", "2"] == 2000


def test_outcomes_and_drops_are_counted():
    metrics = Metrics()
    tiny = metrics.model("tiny", 1, "float", "abc")
    tiny.outcome("ok")
    tiny.outcome("invalid-image")
    tiny.dropped("deadline")

    seen = samples(metrics)

    assert seen["foldserve_images_total", "tiny", "ok", "1"] == 1
    assert seen["foldserve_images_total", "tiny", "invalid-image", "1"] == 1
    assert seen["foldserve_dropped_total", "tiny", "deadline", "1"] == 1


def test_the_queue_is_read_when_it_is_asked_for():
    metrics = Metrics()
    waiting = [1, 2, 3]
    metrics.model("tiny", 1, "float", "abc").depth_from(lambda: len(waiting))
    assert samples(metrics)["foldserve_pending_request_count", "tiny", "1"] == 3
    waiting.pop()

    assert samples(metrics)["foldserve_pending_request_count", "tiny", "1"] == 2


def test_a_stage_is_timed_even_when_it_fails():
    metrics = Metrics()
    tiny = metrics.model("tiny", 1, "float", "abc")
    with pytest.raises(ZeroDivisionError), tiny.timed("decode"):
        assert 1 / 0

    assert samples(metrics)["foldserve_stage_duration_seconds_count", "tiny", "decode", "1"] == 1


def test_two_services_in_one_process_do_not_share_numbers():
    one, other = Metrics(), Metrics()
    one.request("/predict", 200)

    assert ("foldserve_http_requests_total", "200", "ok", "/predict") not in samples(other)


STATISTICS = PixelStatistics(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.1))
LABELS = ("cat", "dog", "owl")


def manifest(pixels: PixelStatistics | None = STATISTICS) -> Manifest:
    return Manifest(name="tiny", labels=LABELS, preprocessing=spec_for(), pixels=pixels)


def test_answers_are_counted_by_their_first_class_and_its_probability():
    metrics = Metrics()
    images = random_pixels(5)
    logits = TinyModel().logits(images).astype(np.float32)
    metrics.model("tiny", 1, "float", "abc", manifest()).answered(images, logits)

    seen = samples(metrics)

    best = [top_k(one, LABELS, 1)[0] for one in logits]
    for label in LABELS:
        count = sum(one.label == label for one in best)
        assert seen["foldserve_predictions_total", label, "tiny", "1"] == count
    assert seen["foldserve_confidence_count", "tiny", "1"] == 5
    assert seen["foldserve_confidence_sum", "tiny", "1"] == pytest.approx(sum(one.score for one in best), rel=1e-5)


def test_mean_and_deviation_of_live_pixels_follow_from_the_sums_beside_those_of_training():
    metrics = Metrics()
    tiny = metrics.model("tiny", 1, "float", "abc", manifest())
    images = random_pixels(6, side=30)  # small enough that every pixel is sampled
    for batch in (images[:4], images[4:]):
        tiny.answered(batch, np.zeros((len(batch), 3), np.float32))

    seen = samples(metrics)

    count = seen["foldserve_input_pixels_total", "tiny", "1"]
    assert count == 6 * 30 * 30
    for channel in range(3):
        mean = seen["foldserve_input_pixel_sum_total", str(channel), "tiny", "1"] / count
        square = seen["foldserve_input_pixel_square_sum_total", str(channel), "tiny", "1"] / count
        live = images[..., channel].astype(np.float64) / 255
        assert mean == pytest.approx(live.mean(), rel=1e-5)
        assert (square - mean**2) ** 0.5 == pytest.approx(live.std(), rel=1e-4)
        assert seen["foldserve_training_pixel_mean", str(channel), "tiny", "1"] == STATISTICS.mean[channel]
        assert seen["foldserve_training_pixel_deviation", str(channel), "tiny", "1"] == STATISTICS.std[channel]


def test_a_model_that_does_not_know_its_training_pixels_has_no_drift_metrics():
    metrics = Metrics()
    metrics.model("tiny", 1, "float", "abc", manifest(None)).answered(random_pixels(1), np.zeros((1, 3), np.float32))

    assert b"_pixel" not in b"".join(line for line in metrics.exposition().splitlines() if not line.startswith(b"#"))


def test_padding_is_a_share_of_the_rows_that_were_executed():
    metrics = Metrics()
    tiny = metrics.model("tiny", 1, "float", "abc")
    tiny.executed(8, 3)
    tiny.executed(1, 0)

    assert samples(metrics)["foldserve_executed_rows_total", "tiny", "1"] == 9
    assert samples(metrics)["foldserve_padding_rows_total", "tiny", "1"] == 3


def test_a_model_that_is_retired_is_no_longer_said_to_be_served_but_its_counts_stay():
    metrics = Metrics()
    tiny = metrics.model("tiny", 1, "float", "abc", manifest())
    tiny.certificate("certified", "def")
    tiny.depth_from(lambda: 5)
    tiny.outcome("ok")
    tiny.retire()

    seen = samples(metrics)

    assert seen["foldserve_images_total", "tiny", "ok", "1"] == 1
    gone = ("model_info", "certificate_info", "pending_request_count", "queue_depth", "training_pixel_mean")
    assert not any(key[0] == f"foldserve_{name}" for key in seen for name in gone)


def test_versions_of_one_model_are_counted_apart():
    metrics = Metrics()
    for version, count in ((1, 2), (2, 3)):
        one = metrics.model("tiny", version, "float", "abc")
        for _ in range(count):
            one.outcome("ok")

    seen = samples(metrics)
    assert [seen["foldserve_images_total", "tiny", "ok", version] for version in ("1", "2")] == [2, 3]
