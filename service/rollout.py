"""Which versions of a model are served, and as what: models/<name>/serving.json, or what an administrator asks for.

    {"stable": 3, "canary": 4, "canary_share": 0.05, "shadow": 5, "also": [2]}

Every entry may be left out: stable is then the highest version that is neither canary nor shadow.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from service.artifact import versions
from service.errors import ArtifactError, fault_in

SERVING_FILE = "serving.json"


def _other_than_null(instead: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value is None:
            raise ValueError(f"null is for canary and shadow alone; {instead}, or leave it out")
        return value

    return BeforeValidator(check)


Version = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), _other_than_null("0 is no share")]
Others = Annotated[tuple[Version, ...], _other_than_null("[] is no other version")]


class Rollout(BaseModel):
    """What is asked for; `plan` makes it complete."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stable: Version | None = Field(None, description="version that answers")
    canary: Version | None = Field(None, description="version that answers a share of the requests in its place")
    canary_share: Share = Field(0.0, description="that share, 0 to 1")
    shadow: Version | None = Field(
        None, description="version that gets the same images; it is compared, never answered"
    )
    also: Others = Field((), description="versions that answer only who asks for them with ?version=")

    @classmethod
    def of(cls, plan: "Plan") -> "Rollout":
        """Return what asks for exactly this plan."""
        return cls(
            stable=plan.stable,
            canary=plan.canary,
            canary_share=plan.canary_share,
            shadow=plan.shadow,
            also=tuple(sorted(plan.also)),
        )

    def over(self, other: "Rollout") -> "Rollout":
        """Return `other` with every entry that was named here, be it as null, in its place.

        A share that is `other`'s ends with its canary.
        """
        update = {name: getattr(self, name) for name in self.model_fields_set}
        if "canary" in update and update["canary"] is None:
            update.setdefault("canary_share", 0.0)
        return other.model_copy(update=update)

    @property
    def is_complete(self) -> bool:
        """Whether every entry was named, so that nothing is left to a file."""
        return self.model_fields_set == Rollout.model_fields.keys()

    def plan(self, present: list[int]) -> "Plan":
        """Return the plan for the versions that are there, ascending.

        Raises ArtifactError when one is missing, none is left to be stable, or what is asked for contradicts itself.
        """
        if self.canary is None and self.canary_share > 0:
            raise ArtifactError(
                f"canary_share is {self.canary_share:g} and there is no canary to get it; name one as canary, or leave "
                "canary_share out"
            )
        others = [version for version in present if version not in {self.canary, self.shadow}]
        stable = self.stable if self.stable is not None else max(others, default=None)
        if stable is None:
            raise ArtifactError("there is no version left to be stable")
        plan = Plan(stable, self.canary, self.canary_share, self.shadow, frozenset(self.also))
        if missing := sorted(plan.versions - set(present)):
            raise ArtifactError(f"version {', '.join(map(str, missing))} is not there; there are {present}")
        if stable in {self.canary, self.shadow}:
            raise ArtifactError(
                f"version {stable} cannot be stable and canary or shadow at once; name another, or null for none"
            )
        if self.canary is not None and self.canary == self.shadow:
            raise ArtifactError(
                f"version {self.canary} cannot be canary and shadow at once; name another, or null for none"
            )
        return plan


@dataclass(frozen=True, slots=True)
class Plan:
    """Which versions are loaded, and which of them answers whom."""

    stable: int
    canary: int | None = None
    canary_share: float = 0.0
    shadow: int | None = None
    also: frozenset[int] = frozenset()

    @property
    def versions(self) -> frozenset[int]:
        """All versions that must be loaded."""
        named = {self.stable, self.canary, self.shadow} - {None}
        return frozenset(version for version in named if version is not None) | self.also

    def choose(self, request_id: str) -> int:
        """Return the version that answers: a function of the request's id alone, so the same id gets the same one."""
        if self.canary is None:
            return self.stable
        place = int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8]) / 2**64  # uniform in 0 to 1
        return self.canary if place < self.canary_share else self.stable


def read_rollout(folder: Path) -> Rollout:
    """Read models/<name>/serving.json; without that file, all is left to the defaults. Raises ArtifactError."""
    path = folder / SERVING_FILE
    try:
        return Rollout.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Rollout()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise ArtifactError(f"{path}: {fault_in(error.errors()[0], Rollout.model_fields)}") from None


def write_rollout(folder: Path, rollout: Rollout) -> None:
    """Write models/<name>/serving.json, whole or not at all. Raises ArtifactError."""
    path, partial = folder / SERVING_FILE, folder / f".{SERVING_FILE}"
    try:
        partial.write_text(rollout.model_dump_json(exclude_defaults=True) + "\n")
        partial.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror}") from None


def stamp_of(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return name, size, time of change and inode of every file in a folder: equal where nothing was written."""
    try:
        found = [(entry.name, entry.stat()) for entry in sorted(folder.iterdir()) if entry.is_file()]
    except OSError:  # it went while it was looked at
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found)


Stamp = tuple[tuple[str, int, int, int], ...]
Snapshot = tuple[tuple[int, Stamp], ...]


def snapshot_of(folder: Path) -> Snapshot:
    """Return the stamps of a model's folder, as version 0, and of all its versions."""
    return ((0, stamp_of(folder)), *((version, stamp_of(folder / str(version))) for version in versions(folder)))
