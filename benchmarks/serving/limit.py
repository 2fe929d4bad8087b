"""The limit without HTTP: decode, run and rank on every core, each image by itself, as fast as threads can."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.serving.networks import Network, repository
from service.artifact import Artifact
from service.engine import Device, open_engine
from service.exact_engine import ExactEngine
from service.manifest import Form
from service.postprocessing import top_k
from service.preprocessing import decode

CPU = Device("cpu", "cpu")


def images_per_s(models: Path, network: Network, form: Form, seconds: float) -> float:
    """Return how many images a second all cores label together, one run thread each."""
    artifact = Artifact.load(repository(models, network) / network.name / "1", form)
    exact = form == "exact"
    engine = ExactEngine(artifact.model_bytes, CPU, open_engine) if exact else open_engine(artifact.model_bytes, CPU)
    encoded, spec, labels = network.image(), artifact.manifest.preprocessing, artifact.manifest.labels
    stop = time.monotonic() + seconds

    def work(_: int) -> int:
        count = 0
        while time.monotonic() < stop:
            logits = engine.run(decode(encoded, spec)[None])
            top_k(logits[0], labels, 5)
            count += 1
        return count

    cores = len(os.sched_getaffinity(0))
    started = time.monotonic()
    with ThreadPoolExecutor(cores) as pool:
        total = sum(pool.map(work, range(cores)))
    return total / (time.monotonic() - started)
