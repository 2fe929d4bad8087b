"""Receipts: an answer tied to model, certificate, pixels and bits, so that anybody can have it made again.

A receipt is signed (HMAC-SHA-256, RFC 2104) only where a key is set; without one, a replay shows that the answer is
what this model gives for these pixels, not who gave it.
"""

import hashlib
import hmac
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from service.independence.fingerprint import digest_of_json
from service.independence.probe import digest_of
from service.manifest import Form


class Receipt(BaseModel):
    """What an answer was made of; digests are sha256 in hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: str
    version: int
    form: Form
    model_digest: str
    certificate: str
    answer_digest: str
    pixels: str
    logits: str
    signature: str | None = None

    def signed(self, key: bytes | None) -> "Receipt":
        """Return the receipt with its signature, or as it is without a key."""
        return self if key is None else self.model_copy(update={"signature": self._signature(key)})

    def is_signed_by(self, key: bytes) -> bool:
        """True when the signature is this key's; compared in constant time."""
        return hmac.compare_digest((self.signature or "").encode(), self._signature(key).encode())

    def _signature(self, key: bytes) -> str:
        message = digest_of_json(self.model_dump(mode="json", exclude={"signature"}))
        return hmac.new(key, message.encode(), hashlib.sha256).hexdigest()


def pixels_digest(pixels: NDArray[np.uint8]) -> str:
    """Return the sha256 of an image's pixels and their shape: what the model saw, after decoding."""
    shape = ",".join(str(side) for side in pixels.shape)
    return hashlib.sha256(f"{shape};".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def logits_digest(logits: NDArray[np.float32]) -> str:
    """Return the sha256 of an image's logits, as little-endian float32."""
    return digest_of(logits)
