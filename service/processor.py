"""Which processor this is, as far as kernels are chosen by it."""

import platform
import re
from pathlib import Path
from typing import Any

KEYS = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "CPU implementer", "CPU part")
# The instruction sets that kernels are chosen by, on x86 and on ARM.
FLAGS = re.compile(r"^(sse\w*|ssse3|avx\w*|fma\w*|f16c|bmi2|amx\w*|neon|asimd\w*|sve\w*|sme2?|sme_\w+|i8mm|bf16)$")
X86 = frozenset({"x86_64", "AMD64", "i686"})


def describe_processor() -> dict[str, Any]:
    """Return the machine's architecture and, where the kernel tells, the processor's names and instruction sets."""
    facts: dict[str, Any] = {"machine": platform.machine()}
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return facts
    lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    flags = (lines.get("flags") or lines.get("Features") or "").split()
    facts |= {key: lines[key] for key in KEYS if key in lines}
    return facts | {"flags": sorted(flag for flag in flags if FLAGS.match(flag))}


def saturates_signed_products(facts: dict[str, Any] | None = None) -> bool:
    """True on x86 without VNNI, where sums of two products of unsigned and signed bytes are cut off at 16 bits."""
    facts = describe_processor() if facts is None else facts
    return facts["machine"] in X86 and not any("vnni" in flag for flag in facts.get("flags", ()))
