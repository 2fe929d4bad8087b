"""Training's promises held to on this device: going on after a kill, equal bits, compiling, several processes.

    python benchmarks/training_cuda.py resume          killed with SIGKILL, a run goes on: how far from an unbroken one?
    python benchmarks/training_cuda.py deterministic   two runs with deterministic = true: the same bits, or a refusal
    python benchmarks/training_cuda.py compiled        a compiled run beside one that is not
    python benchmarks/training_cuda.py processes       torchrun beside one process at the same global batch
    … --device cpu                                     the same there, to try this file

Each prints what it saw and exits 1 where it is not what was promised. A run has few steps: rounding grows with each.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import sleep

sys.path.insert(0, str(Path(__file__).parents[1]))  # or this file, whose folder comes first, would be `training`

TRAIN = ["-m", "foldserve", "train", "digits", "--set", "validation_images=1300", "--set", "batch_size=68"]
SMALL = ["--set", "epochs=2", "--set", "translate=0", "--set", "precision=float32"]
ROUNDING = 1e-3  # of a tensor's largest value: four steps of float32 sums in another order, each step adding to it


def main() -> int:
    """Do what the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(CHECKS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return CHECKS[arguments.what](Path(folder), arguments.device)


def resume(folder: Path, device: str) -> int:
    """Kill a run after its first write, let it go on, and hold it against an unbroken one."""
    given = [*SMALL, "--set", f"device={device}", "--set", "epochs=6", "--set", "save_steps=1"]
    trained(folder / "whole", *given)
    with subprocess.Popen(
        [sys.executable, *TRAIN, *given, "--out", str(folder / "run")], stdout=subprocess.DEVNULL
    ) as run:
        while not (folder / "run" / "last.safetensors").exists() and run.poll() is None:
            sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.pid, signal.SIGKILL)
    if run.returncode == 0:
        print("it ended before it could be killed")
        return 1
    trained(folder / "run", "--resume", is_resumed=True)
    return verdict(furthest(folder / "whole", folder / "run"), 0 if device == "cpu" else 10 * ROUNDING)


def deterministic(folder: Path, device: str) -> int:
    """Train twice with only deterministic operations; a refusal by name is an answer too."""
    for name in ("first", "second"):
        done = trained(folder / name, "--set", f"device={device}", "--set", "deterministic=true", is_refusable=True)
        if done.returncode:
            print(f"refused: {done.stderr.strip().splitlines()[-1]}")
            return 0 if "deterministic = true:" in done.stderr else 1
    return verdict(furthest(folder / "first", folder / "second"), 0)


def compiled(folder: Path, device: str) -> int:
    """Train compiled and not, the same few steps."""
    for way in ("off", "on"):
        print(trained(folder / way, *SMALL, "--set", f"device={device}", "--set", f"compile={way}").stdout)
    return verdict(furthest(folder / "off", folder / "on"), ROUNDING)


def processes(folder: Path, device: str) -> int:
    """Train with one process, with one under torchrun, and with several: four where there are as many GPUs, else two.

    Two that share a GPU talk through gloo; a GPU each, through NCCL.
    """
    import torch

    given = [*SMALL, "--set", f"device={device}"]
    trained(folder / "alone", *given)
    several = 4 if device == "cuda" and torch.cuda.device_count() >= 4 else 2  # numbers that divide batch_size
    code = 0
    for count in (1, several):
        run = folder / str(count)
        trained(run, *given, launcher=["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"])
        print(f"{count} under torchrun: ", end="")
        code |= verdict(furthest(folder / "alone", run), ROUNDING)
    return code


def trained(
    run: Path, *given: str, launcher: list[str] | None = None, is_resumed: bool = False, is_refusable: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `foldserve train` in a process of its own; exit with what it says where it fails."""
    command = [sys.executable, *(launcher or []), *(TRAIN[:4] if is_resumed else TRAIN), *given, "--out", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not is_refusable:
        sys.exit(done.stdout + done.stderr)
    return done


def furthest(run: Path, other: Path) -> float:
    """Return the largest difference of two runs' last weights and statistics, as a share of a tensor's largest."""
    import torch
    from safetensors.torch import load_file

    mine, theirs = (load_file(one / "last.safetensors") for one in (run, other))
    assert list(mine) == list(theirs), "the two hold other tensors"
    of_network = [(mine[name], theirs[name]) for name in mine if not name.startswith("optimizer.")]
    shares = [(one - two).abs().max() / one.abs().max().clamp_min(1e-6) for one, two in of_network]
    return float(torch.stack(shares).max())  # NaN stays NaN


def verdict(difference: float, allowed: float) -> int:
    """Print and return whether two runs are as near as they have to be; 0 means the same bits."""
    print(f"largest difference {difference:.2g} of a tensor's largest value (allowed {allowed:.2g})")
    return int(not difference <= allowed)  # NaN is far


CHECKS: dict[str, Callable[[Path, str], int]] = {
    "resume": resume,
    "deterministic": deterministic,
    "compiled": compiled,
    "processes": processes,
}

if __name__ == "__main__":
    sys.exit(main())
