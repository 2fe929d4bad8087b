"""What /metrics shows, read by Prometheus's own parser."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics


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
