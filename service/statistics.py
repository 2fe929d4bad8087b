"""A model's counters in the words of the Open Inference Protocol's statistics extension. Knows no web.

Each duration has the count that belongs to it: requests for `success` and `fail`, images for `queue` and
`compute_input` (their decoding), runs for `compute_infer`, requests for `compute_output`. Other servers count every one
by requests.

Source: Triton's extension_statistics.md.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

PREFIX = "foldserve_"
NANO = 1e9
# What the protocol calls a duration, and the histogram and label that hold it.
DURATIONS = {
    "success": ("request_duration_seconds", "ok"),
    "fail": ("request_duration_seconds", "failed"),
    "queue": ("stage_duration_seconds", "queue"),
    "compute_input": ("stage_duration_seconds", "decode"),
    "compute_infer": ("stage_duration_seconds", "infer"),
    "compute_output": ("stage_duration_seconds", "encode"),
}


def statistics_of(name: str, version: int, counts: Iterable[tuple[str, dict[str, str], float]]) -> dict[str, Any]:
    """Return the statistics of a model's version from its counts: name, labels, value."""
    totals: defaultdict[tuple[str, str], float] = defaultdict(float)
    for count, labels, value in counts:
        totals[count, labels.get("stage") or labels.get("outcome") or ""] += value
    return {
        "name": name,
        "version": str(version),
        "inference_count": int(totals[PREFIX + "batch_size_sum", ""]),
        "execution_count": int(totals[PREFIX + "batch_size_count", ""]),
        "inference_stats": {
            **{duration: _duration(totals, *where) for duration, where in DURATIONS.items()},
            "cache_hit": {"count": int(totals[PREFIX + "cache_hits_total", ""]), "ns": 0},
            "cache_miss": {"count": int(totals[PREFIX + "cache_misses_total", ""]), "ns": 0},
        },
        "batch_stats": [],
    }


def _duration(totals: dict[tuple[str, str], float], histogram: str, label: str) -> dict[str, int]:
    count, seconds = (totals[f"{PREFIX}{histogram}_{what}", label] for what in ("count", "sum"))
    return {"count": int(count), "ns": round(NANO * seconds)}
