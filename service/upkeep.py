"""The repository at rest: what it holds, one version less, another version first. Runs no model.

A running service is not told: it sees serving.json and the folders at its next look or load.
"""

import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.artifact import FILES, MODEL_NAME, Artifact, versions
from service.errors import ArtifactError
from service.manifest import Form
from service.rollout import SERVING_FILE, Plan, read_rollout, write_rollout

ROLES = ("stable", "canary", "shadow")


@dataclass(frozen=True, slots=True)
class Listed:
    """One version in the repository; `roles` as serving.json gives them, `problem` where it cannot be read."""

    name: str
    version: int
    roles: tuple[str, ...]
    forms: tuple[Form, ...]
    bytes: int
    classes: int | None
    problem: str = ""


def listing(root: Path) -> list[Listed]:
    """Return every version of every model below `root`, by name and version. Raises ArtifactError without a folder."""
    if not root.is_dir():
        raise ArtifactError(f"{root}: no such folder; name the model repository with --models")
    names = sorted(one.name for one in root.iterdir() if MODEL_NAME.fullmatch(one.name))
    return [_listed(root, name, version) for name in names for version in versions(root / name)]


def _listed(root: Path, name: str, version: int) -> Listed:
    folder, roles, classes, problem = root / name / str(version), tuple[str, ...](), None, ""
    forms = tuple(form for form, file in FILES.items() if (folder / file).is_file())
    size = sum((folder / FILES[form]).stat().st_size for form in forms)
    try:
        roles = roles_of(root / name, version)
        classes = len(Artifact.load(folder).manifest.labels)
    except ArtifactError as error:
        problem = str(error)
    return Listed(name, version, roles, forms, size, classes, problem)


def roles_of(folder: Path, version: int) -> tuple[str, ...]:
    """Return what a version is served as: stable, canary, shadow, also, or nothing. Raises ArtifactError."""
    return tuple(_roles(plan_of(folder), version))


def plan_of(folder: Path) -> Plan:
    """Return what a service makes of models/<name>/. Raises ArtifactError."""
    return read_rollout(folder).plan(versions(folder))


def _roles(plan: Plan, version: int) -> Iterator[str]:
    if version == plan.stable:
        yield "stable"
    if version == plan.canary:
        yield f"canary {plan.canary_share:.0%}"
    if version == plan.shadow:
        yield "shadow"
    if version in plan.also:
        yield "also"


def find(root: Path, name: str, version: int | None = None) -> tuple[Path, int]:
    """Return a model's folder and a version of it, by default the stable one. Raises ArtifactError."""
    present = versions(root / name) if MODEL_NAME.fullmatch(name) else []
    if not present:
        raise ArtifactError(f"{root} holds no model {name}; see `foldserve models list`")
    if version is None:
        return root / name, plan_of(root / name).stable
    if version not in present:
        raise ArtifactError(f"{root / name} holds no version {version}; it has {', '.join(map(str, present))}")
    return root / name, version


def reasons_to_keep(folder: Path, version: int) -> list[str]:
    """Return why removing a version would be noticed; empty where it would not."""
    reasons = ["it is the only version"] if versions(folder) == [version] else []
    try:
        roles = roles_of(folder, version)
    except ArtifactError:  # a serving.json that is wrong is no reason to keep what it may name
        return reasons
    return reasons + [f"it is served ({', '.join(roles)})"] * bool(roles)


def remove(folder: Path, version: int) -> str:
    """Remove a version, whole or not at all, and its part in serving.json; return what is served then, in words.

    Raises ArtifactError where the folder cannot be changed.
    """
    left = [one for one in versions(folder) if one != version]
    hidden = folder / f".removed-{version}-{secrets.token_hex(4)}"  # no version's name: nobody loads it
    try:
        (folder / str(version)).rename(hidden)
    except OSError as error:
        raise ArtifactError(f"{folder / str(version)} cannot be removed: {error.strerror}; it is still there") from None
    try:
        _forget(folder, version, left)
    except (ArtifactError, OSError) as error:
        hidden.rename(folder / str(version))
        raise ArtifactError(f"{folder / str(version)} is still there: {error}") from None
    shutil.rmtree(hidden, ignore_errors=True)
    if not left and not any(folder.iterdir()):
        folder.rmdir()
    return f"version {plan_of(folder).stable} answers" if left else "the model has no version left"


def _forget(folder: Path, version: int, left: list[int]) -> None:
    """Take a version out of serving.json, so that what remains is a plan."""
    if not (folder / SERVING_FILE).exists():
        return
    if not left:
        (folder / SERVING_FILE).unlink()
        return
    rollout = read_rollout(folder)
    changes: dict[str, object] = {role: None for role in ROLES if getattr(rollout, role) == version}
    if "canary" in changes:
        changes["canary_share"] = 0.0
    if version in rollout.also:
        changes["also"] = tuple(one for one in rollout.also if one != version)
    changed = rollout.model_copy(update=changes)
    changed.plan(left)
    if changes:
        write_rollout(folder, changed)


def roll_back(folder: Path, to: int | None = None) -> tuple[int, int]:
    """Make a version stable, by default the one before the stable one; return the version until now, and the new one.

    Raises ArtifactError where there is none, or it cannot be read; then nothing was changed.
    """
    plan, present = plan_of(folder), versions(folder)
    others = {plan.canary, plan.shadow}
    target = (
        max((one for one in present if one < plan.stable and one not in others), default=None) if to is None else to
    )
    if target is None:
        raise ArtifactError(f"{folder.name} has no version before {plan.stable}; it has {', '.join(map(str, present))}")
    if target == plan.stable:
        raise ArtifactError(f"{folder.name} version {target} is stable already")
    changed = read_rollout(folder).model_copy(update={"stable": target})
    changed.plan(present)
    Artifact.load(folder / str(target))
    write_rollout(folder, changed)
    return plan.stable, target
