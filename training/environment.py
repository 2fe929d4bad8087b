"""What the environment says of this process, and what is told it there: its only reader in `training`."""

import os
from dataclasses import dataclass
from pathlib import Path

from training.config import TrainConfig
from training.errors import UsageError

MODELS_HELP = "model repository [FOLDSERVE_MODELS, else models]"


def data_folders(flag: Path | None) -> list[Path]:
    """Return where data sets are looked for: `--data-dir`, else FOLDSERVE_DATA, then the download folder."""
    given = [flag] if flag is not None else [Path(value) for value in [os.environ.get("FOLDSERVE_DATA")] if value]
    return [*given, download_folder()]


@dataclass(frozen=True, slots=True)
class Launched:
    """This process among those that torchrun started; `local` is of one machine."""

    rank: int
    local_rank: int
    local_world_size: int
    world_size: int


def launched_processes() -> Launched | None:
    """Return what torchrun says of this process, None where it did not start it.

    Raises UsageError where another launcher says that there are several, and not all that torchrun says.
    """
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    if missing := [name for name in names if name not in os.environ]:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError(
                f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, and {', '.join(missing)} not set: each process would train "
                "alone; start them with torchrun, or unset WORLD_SIZE"
            )
        return None
    return Launched(*(int(os.environ[name]) for name in names))


def prepare_arithmetic(config: TrainConfig) -> None:
    """Set what libraries read only when they are loaded; call before torch is imported.

    OpenMP's idle threads are to sleep: by default they spin, and when another process holds a core a training step
    waits for a thread that cannot run (on two busy cores a run took twice the CPU time). cuBLAS gives equal bits only
    with a workspace of a fixed size.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def wants_tracebacks() -> bool:
    """Whether an error is shown with where it came from: FOLDSERVE_LOG_LEVEL=debug, as in the service."""
    return os.environ.get("FOLDSERVE_LOG_LEVEL") == "debug"


def default_models() -> Path:
    """Return the model repository where no flag names one: FOLDSERVE_MODELS, as in the service, else `models`."""
    return Path(os.environ.get("FOLDSERVE_MODELS") or "models")


def download_folder() -> Path:
    """Return where downloads are kept: `data` in the state folder."""
    return Path(os.environ.get("FOLDSERVE_STATE") or Path.home() / ".cache" / "foldserve") / "data"
