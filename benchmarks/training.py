"""Training measured: images/s against a bare PyTorch loop, and how soon a data set is learned.

    python benchmarks/training.py                  CPU: share of a bare loop; Fashion-MNIST to 92.5 % (FOLDSERVE_DATA)
    python benchmarks/training.py --device cuda    the same on a GPU, MNIST too, and ResNet-50 on synthetic 224² images

Both loops do the same work with the same network, batch, precision and optimizer, interleaved in short rounds, so that
a change of the machine's speed meets both; the share is the median over the rounds, told with its quartiles. What a run
proves is printed line by line, then once more as one line of JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))  # or this file, whose folder comes first, would be `training`

from training.config import TrainConfig, data_folders, prepare_arithmetic
from training.presets import preset

prepare_arithmetic(preset("fashion-mnist"))  # before torch is loaded, as the command does

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from training.architectures import build
from training.batches import Batches, training_batches
from training.learner import Learner
from training.loop import Normalize, arithmetic, choose_device, choose_precision
from training.optimization import build_optimizer
from training.run import train

SHARE_WANTED = {"small_cnn": 0.95, "resnet50": 0.97}
LEARNED_WANTED = {  # accuracy, seconds
    "cpu": {"fashion-mnist": (0.925, 360)},
    "cuda": {"mnist": (0.994, 5), "fashion-mnist": (0.94, 20)},
}


def main() -> None:
    """Measure what this machine can show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=41, help="interleaved rounds of each loop [41]")
    parser.add_argument("--steps", type=int, default=8, help="steps a round [8]")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each preset that is learned [1]")
    parser.add_argument("--only", choices=("share", "learn"), help="one of the two parts")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    found: dict[str, object] = {"device": str(device), "threads": torch.get_num_threads()}
    if arguments.only != "learn":
        found |= shares(device, arguments.rounds, arguments.steps)
    if arguments.only != "share":
        found |= learned(device, arguments.seeds)
    print(json.dumps(found))


def shares(device: torch.device, rounds: int, steps: int) -> dict[str, float]:
    """Measure our step against a bare one, for each network that this device is meant for."""
    config = preset("fashion-mnist")
    precisions = sorted({choose_precision("auto", device), "float32"} if device.type == "cpu" else {"bfloat16"})
    cases = [(replace(config, precision=precision), 28, 1) for precision in precisions]
    if device.type == "cuda":
        cases.append((replace(config, architecture="resnet50", batch_size=256, precision="bfloat16"), 224, 3))
    found = {}
    for one, size, channels in cases:
        name, wanted = f"{one.architecture} in {one.precision}", SHARE_WANTED[one.architecture]
        shares_seen, rate = share_of_bare(one, size, channels, device, rounds, steps)
        low, share, high = statistics.quantiles(shares_seen, n=4)
        verdict = "proved" if share >= wanted else "NOT reached"
        print(
            f"{verdict}: {name}, {size}x{size}: {rate:,.0f} images/s, {share:.3f} of a bare loop "
            f"(quartiles {low:.3f} to {high:.3f}, {rounds} rounds; wanted {wanted})"
        )
        found |= {f"{name}: share": round(share, 4), f"{name}: images/s": round(rate)}
    return found


def share_of_bare(
    config: TrainConfig, size: int, channels: int, device: torch.device, rounds: int, steps: int
) -> tuple[list[float], float]:
    """Return the share of the bare loop's speed in each round, and our median images/s."""
    config = replace(config, translate=0.0, rotate=0.0, scale=0.0, flip=False, cutout=0.0, label_smoothing=0.0)
    data = synthetic(config.batch_size * steps, size, channels, device)
    ours, bare = our_loop(config, data, size, channels), bare_loop(config, data, size, channels)
    for loop in (ours, bare):  # algorithms are chosen and memory is taken
        loop()
    ratios, rates = [], []
    for turn in range(rounds):
        order = (ours, bare) if turn % 2 else (bare, ours)
        seconds = {loop: timed(loop, device) for loop in order}
        ratios.append(seconds[bare] / seconds[ours])
        rates.append(config.batch_size * steps / seconds[ours])
    return ratios, statistics.median(rates)


def synthetic(count: int, size: int, channels: int, device: torch.device) -> Batches:
    """Return random images on the device; few are made, and shown again and again."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (min(count, 2048), channels, size, size), dtype=np.uint8))
    repeated = images.repeat(-(-count // len(images)), 1, 1, 1)[:count]
    return Batches(repeated.to(device), torch.arange(count, device=device) % 10)


def fresh(config: TrainConfig, size: int, channels: int, device: torch.device) -> nn.Sequential:
    """Return the same classifier each time."""
    torch.manual_seed(0)
    network = build(config.architecture, channels=channels, classes=10, size=size, bn_momentum=config.bn_momentum)
    model = nn.Sequential(Normalize((0.5,) * channels, (0.25,) * channels), network)
    return model.to(device, torch.float32, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # torch types no call of both


def our_loop(config: TrainConfig, data: Batches, size: int, channels: int) -> Callable[[], None]:
    """Return an epoch as training runs it: guard, autocast, clipping where configured, sums."""
    model = fresh(config, size, channels, data.device)
    learner = Learner(model, build_optimizer(config, model), config, arithmetic=arithmetic(config, data.device))

    def run() -> None:
        for _, micro in training_batches(data, config, 1):
            learner.step(micro, 1)

    return run


def bare_loop(config: TrainConfig, data: Batches, size: int, channels: int) -> Callable[[], None]:
    """Return the shortest loop that does the same: slice, forward, loss, backward, step, and the loss read once."""
    model = fresh(config, size, channels, data.device)
    optimizer = build_optimizer(config, model)
    kind = arithmetic(config, data.device)

    def run() -> None:
        order = torch.randperm(len(data)).to(data.device)
        for start in range(0, len(data), config.batch_size):
            indices = order[start : start + config.batch_size]
            with torch.autocast(data.device.type, kind, enabled=kind != torch.float32):
                logits = model(data.images[indices])
            loss = functional.cross_entropy(logits.float(), data.targets[indices])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss.item()

    return run


def timed(loop: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = perf_counter()
    loop()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - started


def learned(device: torch.device, seeds: int) -> dict[str, object]:
    """Train each preset that has a mark here to its end, over seeds, and say how good it is after how long."""
    if len(data_folders(None)) < 2:
        print("skipped: learning: FOLDSERVE_DATA names no folder")
        return {}
    found: dict[str, object] = {}
    for name, mark in LEARNED_WANTED[device.type].items():
        runs = [learned_once(name, device, seed) for seed in range(seeds)]
        found |= told(name, runs, *mark)
    return found


def learned_once(name: str, device: torch.device, seed: int) -> dict[str, float]:
    """Return a run's accuracy on the test images, its seconds of epochs and validation, and those around them."""
    started = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = train(replace(preset(name), device=device.type, seed=seed), Path(folder) / "run")
    around = perf_counter() - started - result["seconds"]
    return {"accuracy": result["test_accuracy"], "seconds": result["seconds"], "around": round(around, 1)}


def told(name: str, runs: list[dict[str, float]], wanted: float, limit: float) -> dict[str, object]:
    """Print the verdict on a preset's runs, and return their numbers; every run has to hold both marks."""
    columns = {key: [one[key] for one in runs] for key in runs[0]}
    accuracies, seconds = columns["accuracy"], columns["seconds"]
    is_proved = min(accuracies) >= wanted and max(seconds) <= limit
    spread = f" ± {statistics.stdev(accuracies):.2%}" if len(runs) > 1 else ""
    print(
        f"{'proved' if is_proved else 'NOT reached'}: {name}: {statistics.mean(accuracies):.2%}{spread} of the test "
        f"images (worst of {len(runs)}: {min(accuracies):.2%}) in {max(seconds):.1f} s of training, and "
        f"{max(columns['around']):.1f} s around it (wanted {wanted:.1%} in {limit} s)"
    )
    return {f"{name}: {key}": values for key, values in columns.items()}


if __name__ == "__main__":
    main()
