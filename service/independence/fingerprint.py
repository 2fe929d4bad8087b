"""What the bits of an answer hang on: any change in it voids a certificate. Facts, in order, and their sha256."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from service.cgroup import ControlGroup
from service.config import arithmetic_environment, cpu_count
from service.independence.effort import FULL, QUICK
from service.preprocessing import describe_decoders
from service.processor import describe_processor

PROBE_VERSION = 3  # raised whenever the probe tries something new, so that old certificates are made again


def fingerprint(model_digest: str, form: str, engine: Mapping[str, Any], candidates: list[list[int]]) -> dict[str, Any]:
    """Return the facts. `engine` is what the engine says of itself; `candidates` are [batch_size, threads] in order."""
    return {
        "probe": {"version": PROBE_VERSION, "full": asdict(FULL), "quick": asdict(QUICK)},
        "model": model_digest,
        "form": form,
        "engine": dict(engine),
        "candidates": candidates,
        "filler": "black",
        "decoders": describe_decoders(),
        "numpy": np.__version__,
        "processor": describe_processor(),
        "threads": {"cores": cpu_count(), "quota": _quota()},
        "environment": arithmetic_environment(),
        "flushes_subnormals": flushes_subnormals(),
    }


def digest_of_json(facts: Any) -> str:
    """Return the sha256 of canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flushes_subnormals() -> bool:
    """True when this thread's arithmetic turns subnormal numbers into 0; some libraries switch that on when loaded."""
    return bool(np.float32(1e-40) * np.float32(1.0) == 0)


def _quota() -> str:
    """Return the processor time that the control group allows: a container with less forms other pools."""
    quota = ControlGroup().cpu_quota()
    return "none" if quota is None else f"{quota:g}"
