"""Which batch sizes agree bit for bit on CUDA, for each way cuDNN may be set; `independence --cuda-classes` asks."""

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from service.artifact import Artifact
from service.config import arithmetic_environment
from service.engine import CUDA, cuda_problem
from service.independence.probe import digest_of, fill

SIZES = range(1, 65)
SEARCHES = ("HEURISTIC", "EXHAUSTIVE", "DEFAULT")


def cuda_classes(paths: dict[str, Path], names: list[str], *, dry_run: bool) -> dict[str, Any]:
    """Print, for each network and setting of cuDNN, the groups of batch sizes whose bits agree."""
    if not dry_run and (problem := cuda_problem()):
        sys.exit(f"CUDA cannot be had: {problem}")
    sizes_tried = range(1, 4) if dry_run else SIZES
    searches = SEARCHES[:1] if dry_run else SEARCHES
    found = []
    print("model, algorithm search, use_tf32, prefer_nhwc: groups of batch sizes with equal bits")
    for name, search, tf32, nhwc in itertools.product(names, searches, "01", "01"):
        artifact = Artifact.load(paths[name] / name / "1")
        options = {"cudnn_conv_algo_search": search, "use_tf32": tf32, "prefer_nhwc": nhwc}
        groups: dict[str, list[int]] = {}
        providers: list[Any] = [("CPUExecutionProvider", {})] if dry_run else [(CUDA, options)]
        for size in sizes_tried:
            groups.setdefault(_bits(artifact, size, providers, max(sizes_tried)), []).append(size)
        classes = [{"sizes": sizes, "sound": not bits.startswith("unsound")} for bits, sizes in groups.items()]
        print(name, *options.values(), *(_sizes(one) for one in classes), flush=True)  # what is done outlives a timeout
        found.append({"model": name, **options, "classes": classes})
    # Not through the engine, which would switch TF32 off for the whole process.
    return {"environment": arithmetic_environment(), "cuda_classes": found}


def _bits(artifact: Artifact, size: int, providers: list[Any], count: int) -> str:
    """Return the digest of `count` images' logits at one batch size; one of its own where slot or restart matters."""
    images = np.resize(artifact.golden.pixels, (count, *artifact.golden.pixels.shape[1:]))
    images = images ^ np.arange(len(images), dtype=np.uint8)[:, None, None, None]  # repeated images differ
    digests = set()
    for rotations in ((0, 1, size // 2), (0,)):  # the second session is a restart
        options = onnxruntime.SessionOptions()
        options.use_deterministic_compute = True
        session = onnxruntime.InferenceSession(artifact.model_bytes, options, providers=providers)
        if session.get_providers()[0] != providers[0][0]:
            sys.exit("ONNX Runtime fell back to the CPU")
        for rotation in rotations:
            turned = np.roll(images, rotation, axis=0)
            parts = (fill(turned[at : at + size], size) for at in range(0, len(turned), size))
            logits = np.concatenate([session.run(None, {"image": part})[0] for part in parts])[: len(images)]
            digests.add(digest_of(np.roll(logits, -rotation, axis=0)))
    return digests.pop() if len(digests) == 1 else f"unsound at {size}"


def _sizes(one: dict[str, Any]) -> str:
    return ("{" if one["sound"] else "unsound {") + ",".join(str(size) for size in one["sizes"]) + "}"
