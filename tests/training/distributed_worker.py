"""Run under torchrun by tests: trains, or measures BatchNorm, and leaves what came of it in a folder."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foldserve.cli import main as foldserve
from training import compiling, distributed
from training.distributed import processes
from training.normalization.moments import Moments
from training.normalization.running import snapshot
from training.normalization.synchronized import merge_processes, merge_running_statistics, synchronize


def share(values: torch.Tensor) -> torch.Tensor:
    """Return this process's rows."""
    each = len(values) // distributed.world_size()
    return values[distributed.rank() * each : (distributed.rank() + 1) * each]


def measure(folder: Path) -> None:
    """Run one BatchNorm forward and backward over the joined batch, and merge what was kept apart."""
    given = torch.load(folder / "given.pt", weights_only=True)
    norm = nn.BatchNorm2d(3, momentum=0.3)
    norm.load_state_dict(given["state"])
    model = synchronize(nn.Sequential(norm), torch.device("cpu")).train()
    images = share(given["images"]).clone().requires_grad_()
    answer = model(images)
    (answer * share(given["weights"])).sum().backward()
    merged = merge_processes(Moments.of(given["images"][distributed.rank() :: 2][: 5 - distributed.rank()]))
    found = {
        "answer": answer.detach(),
        "gradient": images.grad,
        "weight_gradient": model[0].weight.grad,
        "mean": snapshot(model)["0"][0],
        "variance": snapshot(model)["0"][1],
        "merged_mean": merged.mean,
        "merged_variance": merged.variance,
    }
    apart = nn.Sequential(nn.BatchNorm2d(3, momentum=1.0)).train()
    apart(share(given["images"]))
    merge_running_statistics(apart)
    found["apart_mean"], found["apart_variance"] = snapshot(apart)["0"]
    torch.save(found, folder / f"found-{distributed.rank()}.pt")


def train(folder: Path) -> int:
    """Run `foldserve train`, and leave the names of what this process wrote in the run's folder."""
    run, wrote = folder / "run", []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        is_opened = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if (is_opened or event in {"os.rename", "os.remove"}) and str(arguments[0]).startswith(str(run)):
            wrote.append(Path(arguments[0]).name)

    sys.addaudithook(watch)
    given = ["--resume"] if (run / "config.json").exists() else ["--config", str(folder / "given.json")]
    code = foldserve(["train", "digits", "--out", str(run), *given])
    (folder / f"wrote-{os.environ['RANK']}.json").write_text(json.dumps(wrote))
    return code


def train_each(folder: Path, lame: str) -> None:
    """Train by every configuration in the folder, asking for a compiler as on CUDA; the process `lame` has none."""
    rank = os.environ["RANK"]
    if rank == lame:
        os.environ |= {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    compiling.is_wanted = lambda config, _: config.compile != "off"
    codes = {}
    for given in sorted(folder.glob("*.json")):
        source = ["--config", str(given), "--data-dir", str(folder)]
        codes[given.stem] = foldserve(["train", "digits", "--out", str(folder / given.stem), *source])
    (folder / f"codes-{rank}").write_text(json.dumps(codes))


def main() -> int:
    """Do what the first argument says, in the folder that the second names."""
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "train":
        return train(folder)
    with processes(torch.device("cpu")):
        if what == "measure":
            measure(folder)
        else:
            train_each(folder, sys.argv[3])
    return 0


sys.exit(main())
