"""Shows the point in numbers: one image alone and in a crowd, as foldserve runs it and as a runtime does by itself."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.engine import Device, OnnxEngine
from service.independence.certificate import Certificate
from service.independence.certify import Subject
from service.independence.probe import Logits, fill
from service.independence.probe_images import Pixels, probe_images

IMAGES = 64
CROWD = 8
CHANNELS = 258  # no multiple of 4: the runtime's blocked layout, whose sums have one order, refuses it
SIDE = 12
THREADS = 4


def demo(subject: Subject, certificate: Certificate) -> Iterator[str]:
    """Yield the lines of the demonstration for a certified model."""
    images = probe_images(IMAGES, subject.artifact.golden.pixels.shape[1:], subject.artifact.golden.pixels)
    reference = certificate.reference
    assert reference is not None
    crowd = max((record.shape for record in certificate.shapes), key=lambda shape: shape.batch_size)
    run = subject.engine.run
    alone = [run(fill(image[None], reference.batch_size), reference.threads)[0] for image in images]
    together = [
        logits
        for start in range(0, IMAGES, crowd.batch_size)
        for logits in run(fill(images[start : start + crowd.batch_size], crowd.batch_size), crowd.threads)
    ]
    yield f"{subject.name}, certified: {IMAGES} images alone, and {crowd.batch_size} at a time"
    yield _verdict(np.stack(alone), np.stack(together)[:IMAGES])
    graph = breaking_graph()
    engine = OnnxEngine(graph, Device("cpu", "cpu"))
    planes = np.random.default_rng(0).integers(0, 256, (CROWD, SIDE, SIDE, CHANNELS), np.uint8)
    lone = np.concatenate([engine.run(plane[None], THREADS) for plane in planes])
    yield f"a {CHANNELS}-channel convolution, plain ONNX Runtime on {THREADS} threads: alone, and {CROWD} at a time"
    yield _verdict(lone, engine.run(planes, THREADS))


def breaking_graph() -> bytes:
    """Return an ONNX file of one 3×3 convolution whose bits, run plainly, depend on the batch.

    ONNX Runtime cuts a lone image's convolution into slices by threads, and with the slices the order of its sums.
    """
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(66, CHANNELS, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["image"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["floats", "weight"], ["features"], name="wide"),
        helper.make_node("Flatten", ["features"], ["logits"]),
    ]
    outputs = 66 * (SIDE - 2) ** 2
    graph = helper.make_graph(
        nodes,
        "breaks",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, CHANNELS])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", outputs])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def _verdict(first: Logits, second: NDArray[np.float32] | Pixels) -> str:
    different = first.view(np.uint32) != second.view(np.uint32)
    images = int(different.reshape(len(different), -1).any(axis=1).sum())
    return f"  {int(different.sum()):,} of {different.size:,} numbers differ, in {images} of {len(different)} images"
