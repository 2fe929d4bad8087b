"""Training measured: images/s against a bare PyTorch loop, and how soon a data set is learned.

    python benchmarks/training.py                  CPU: share of a bare loop; Fashion-MNIST to 92.5 % (FOLDSERVE_DATA)
    python benchmarks/training.py --device cuda    the shares compiled and not, ResNet-50 on synthetic 224² images,
                                                   MNIST and Fashion-MNIST by the fast presets
    … --only share --networks resnet50             a part of it; --only learn --presets mnist-fast --seeds 5 another

Both loops do the same work with the same network, batch, precision and optimizer, interleaved in short rounds, so that
a change of the machine's speed meets both; the share is the median over the rounds, told with its quartiles. What a run
proves is printed line by line, then once more as one line of JSON.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))  # or this file, whose folder comes first, would be `training`

from training.config import TrainConfig
from training.environment import data_folders, prepare_arithmetic
from training.presets import preset

prepare_arithmetic(preset("fashion-mnist"))  # before torch is loaded, as the command does

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.architectures import build
from training.batches import Batches, training_batches
from training.learner import Learner
from training.loop import Normalize, arithmetic, choose_device, choose_precision, warm_up
from training.optimization import build_optimizer
from training.run import train

NETWORKS = {"small_cnn": (28, 1, 128), "resnet50": (224, 3, 256)}  # image size, channels, batch
ON_CPU = {"resnet50": 16}  # batches that are smaller there: 256 photos' activations take some 25 GB
SHARE_WANTED = {"cpu": {"small_cnn": 0.95, "resnet50": 0.97}, "cuda": {"resnet50": 0.97}}
LEARNED_WANTED = {  # accuracy, seconds
    "cpu": {"fashion-mnist": (0.925, 360)},
    "cuda": {"mnist-fast": (0.994, 5), "fashion-mnist-fast": (0.94, 20)},
}


def main() -> None:
    """Measure what this machine can show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=41, help="interleaved rounds of each loop [41]")
    parser.add_argument("--steps", type=int, default=8, help="steps a round [8]")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each preset that is learned [1]")
    parser.add_argument("--only", choices=("share", "learn"), help="one of the two parts")
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), help="whose share is measured [all]")
    parser.add_argument("--presets", nargs="+", help="what is learned [what has a mark on this device]")
    parser.add_argument("--compile", choices=("off", "on", "auto"), help="instead of what the presets say")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    torch.backends.cudnn.allow_tf32 = False  # as training sets it: the first loop must not differ from the others
    found: dict[str, object] = {"device": str(device), "threads": torch.get_num_threads()}
    if arguments.only != "learn":
        networks = arguments.networks or (NETWORKS if device.type == "cuda" else ["small_cnn"])
        for config, size, channels in share_cases(device, networks, arguments.compile):
            found |= told_share(config, size, channels, device, arguments.rounds, arguments.steps)
    if arguments.only != "share":
        found |= learned(device, arguments.seeds, arguments.presets, arguments.compile)
    print(json.dumps(found))


def share_cases(
    device: torch.device, networks: Iterable[str], compile_as: str | None
) -> Iterator[tuple[TrainConfig, int, int]]:
    """Yield configuration, size and channels of each case: on CUDA in bfloat16, compiled and not."""
    is_cuda = device.type == "cuda"
    precisions = ["bfloat16"] if is_cuda else sorted({choose_precision("auto", device), "float32"})
    ways = [compile_as] if compile_as else ["off", "on"] if is_cuda else ["off"]
    for network in networks:
        size, channels, batch = NETWORKS[network]
        batch = batch if is_cuda else ON_CPU.get(network, batch)
        for precision in precisions:
            for way in ways:
                config = replace(preset("fashion-mnist"), architecture=network, batch_size=batch)
                yield replace(config, precision=precision, compile=way), size, channels


def told_share(
    config: TrainConfig, size: int, channels: int, device: torch.device, rounds: int, steps: int
) -> dict[str, float]:
    """Print how fast our step is beside a bare one, and return it."""
    compiled = "" if config.compile == "off" else ", compiled"
    name = f"{config.architecture} in {config.precision}{compiled}"
    wanted = SHARE_WANTED[device.type].get(config.architecture)
    shares_seen, rate = share_of_bare(config, size, channels, device, rounds, steps)
    low, share, high = statistics.quantiles(shares_seen, n=4)
    verdict = "measured" if wanted is None else "proved" if share >= wanted else "NOT reached"
    mark = "" if wanted is None else f"; wanted {wanted}"
    print(
        f"{verdict}: {name}, {size}x{size}: {rate:,.0f} images/s, {share:.3f} of a bare loop "
        f"(quartiles {low:.3f} to {high:.3f}, {rounds} rounds{mark})",
        flush=True,
    )
    return {f"{name}: share": round(share, 4), f"{name}: images/s": round(rate)}


def share_of_bare(
    config: TrainConfig, size: int, channels: int, device: torch.device, rounds: int, steps: int
) -> tuple[list[float], float]:
    """Return the share of the bare loop's speed in each round, and our median images/s."""
    config = config.unchanged_images()
    data = synthetic(config.batch_size * steps, size, channels, device)
    ours, bare = our_loop(config, data, size, channels), bare_loop(config, data, size, channels)
    for loop in (ours, bare):  # algorithms are chosen, memory is taken, the bare loop is compiled
        timed(loop, device)
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
    warm_up(learner, data, print)

    def run() -> None:
        for _, micro in training_batches(data, config, 1):
            learner.step(micro, 1)

    return run


def bare_loop(config: TrainConfig, data: Batches, size: int, channels: int) -> Callable[[], None]:
    """Return the shortest loop that does the same: slice, forward, loss, backward, step, and the loss read once."""
    model = fresh(config, size, channels, data.device)

    def judge(images: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(model(images).float(), targets)

    judged = judge if config.compile == "off" else torch.compile(judge, dynamic=False)
    optimizer = build_optimizer(config, model)
    kind = arithmetic(config, data.device)

    def run() -> None:
        order = torch.randperm(len(data)).to(data.device)
        for start in range(0, len(data), config.batch_size):
            indices = order[start : start + config.batch_size]
            with torch.autocast(data.device.type, kind, enabled=kind != torch.float32):
                loss = judged(data.images[indices], data.targets[indices])
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


def learned(device: torch.device, seeds: int, presets: list[str] | None, compile_as: str | None) -> dict[str, object]:
    """Train each preset that has a mark here to its end, over seeds, and say how good it is after how long."""
    if len(data_folders(None)) < 2:
        print("skipped: learning: FOLDSERVE_DATA names no folder")
        return {}
    found: dict[str, object] = {}
    marks = {name: mark for of_device in LEARNED_WANTED.values() for name, mark in of_device.items()}
    for name in presets or LEARNED_WANTED[device.type]:
        config = replace(preset(name), device=device.type, **({"compile": compile_as} if compile_as else {}))
        runs = [learned_once(config, seed) for seed in range(seeds)]
        found |= told(name, runs, *marks.get(name, (0.0, math.inf)))
    return found


def learned_once(config: TrainConfig, seed: int) -> dict[str, float]:
    """Return a run's accuracy on the test images, and three times in seconds.

    `seconds` are of epochs and validation, `warm_up` of the compiler and CUDA's first step, `around` of all else: data,
    statistics at the end, the test.
    """
    started = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = train(replace(config, seed=seed), Path(folder) / "run")
    warm_up_s = result["warm_up_seconds"]
    around = perf_counter() - started - result["seconds"] - warm_up_s
    found = {"accuracy": result["test_accuracy"], "seconds": result["seconds"]}
    return found | {"warm_up": warm_up_s, "around": round(around, 1), "compiled": float(result["compiled"])}


def told(name: str, runs: list[dict[str, float]], wanted: float, limit: float) -> dict[str, object]:
    """Print the verdict on a preset's runs, and return their numbers; the mean accuracy and every run's time count."""
    columns = {key: [one[key] for one in runs] for key in runs[0]}
    accuracies, seconds = columns["accuracy"], columns["seconds"]
    is_proved = statistics.mean(accuracies) >= wanted and max(seconds) <= limit
    print(
        f"{'proved' if is_proved else 'NOT reached'}: {name}{', compiled' if all(columns['compiled']) else ''}: "
        f"{_mean(accuracies, '.2%')} of the test images (worst of {len(runs)}: {min(accuracies):.2%}) in "
        f"{_mean(seconds, '.1f')} s of training; the first run's compiler and first step took "
        f"{columns['warm_up'][0]:.1f} s, the others' {max(columns['warm_up'][1:], default=0):.1f}, and "
        f"{max(columns['around']):.1f} s went into all else (wanted {wanted:.1%} in {limit} s)",
        flush=True,
    )
    return {f"{name}: {key}": values for key, values in columns.items()}


def _mean(values: list[float], form: str) -> str:
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


if __name__ == "__main__":
    main()
