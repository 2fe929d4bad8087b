"""What the bits of an answer hang on: any change in it voids a certificate. Facts, in order, and their sha256."""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from service.config import arithmetic_environment, cpu_count
from service.independence.effort import FULL, QUICK
from service.preprocessing import describe_decoders

PROBE_VERSION = 3  # raised whenever the probe tries something new, so that old certificates are made again
CPU_KEYS = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "CPU implementer", "CPU part")
# The instruction sets that kernels are chosen by, on x86 and on ARM.
CPU_FLAGS = re.compile(r"^(sse\w*|ssse3|avx\w*|fma\w*|f16c|bmi2|amx\w*|neon|asimd\w*|sve\w*|sme2?|sme_\w+|i8mm|bf16)$")


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
        "processor": _processor(),
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


def _processor() -> dict[str, Any]:
    facts: dict[str, Any] = {"machine": platform.machine()}
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return facts
    lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    flags = (lines.get("flags") or lines.get("Features") or "").split()
    facts |= {key: lines[key] for key in CPU_KEYS if key in lines}
    return facts | {"flags": sorted(flag for flag in flags if CPU_FLAGS.match(flag))}


def _quota() -> str:
    """Return the cgroup's share of CPU time, as the kernel writes it: a container with less forms other pools."""
    try:
        return Path("/sys/fs/cgroup/cpu.max").read_text().strip()
    except OSError:
        return "none"
