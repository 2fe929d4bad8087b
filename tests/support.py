"""What several tests share: tiny models with a float64 oracle, image files, an engine that misbehaves on demand."""

import asyncio
import io
import struct
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import onnx
from anyio.from_thread import start_blocking_portal
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from service.app import create_app
from service.config import Settings
from service.engine import Device, open_engine
from service.golden import Golden
from service.manifest import Manifest
from service.preprocessing import Preprocessing

FILTERS = 8
SIDE = 8
GOLDEN_IMAGES = 8
CPU = Device("cpu", "cpu")
PROBLEM_TYPE = "urn:foldserve:problem:"


def spec_for(mode: str = "RGB", size: tuple[int, int] = (SIDE, SIDE), **options) -> Preprocessing:
    return Preprocessing(mode=mode, size=size, mean=(0.0,) * len(mode), std=(1.0,) * len(mode), **options)


@dataclass(frozen=True)
class TinyModel:
    """pixels / 255 → 3×3 convolution → ReLU → mean → matrix: small, and with a float64 twin in NumPy."""

    mode: str = "RGB"
    labels: tuple[str, ...] = ("cat", "dog", "owl")
    name: str = "tiny"
    seed: int = 1

    @property
    def spec(self) -> Preprocessing:
        return spec_for(self.mode)

    def weights(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng(self.seed)
        shapes = {"filters": (FILTERS, len(self.mode), 3, 3), "matrix": (len(self.labels), FILTERS)}
        return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def onnx(self) -> onnx.ModelProto:
        """Return the model without its manifest, so that a test can break it first."""
        nodes = [
            helper.make_node("Transpose", ["image"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Cast", ["planes"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["floats", "scale"], ["scaled"]),
            helper.make_node("Conv", ["scaled", "filters"], ["convolved"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["convolved"], ["positive"]),
            helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["features"]),
            helper.make_node("Gemm", ["features", "matrix"], ["logits"], transB=1),
        ]
        constants = {"scale": np.float32(255).reshape(()), **self.weights()}
        shape = ["batch", SIDE, SIDE, len(self.mode)]
        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(self.labels)])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    def manifest(self) -> Manifest:
        return Manifest(name=self.name, labels=self.labels, preprocessing=self.spec)

    def model_bytes(self) -> bytes:
        model = self.onnx()
        model.metadata_props.add(key="foldserve", value=self.manifest().model_dump_json())
        return model.SerializeToString()

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Return the logits in float64, by NumPy alone."""
        return _forward(pixels, *(weight.astype(np.float64) for weight in self.weights().values()))

    def tolerance(self, pixels: np.ndarray) -> float:
        """Return what float32 may lose: (n + 1)·u·Σ|terms|, n the additions in a row, u = 2^-24 (Higham 2002, 3.1)."""
        additions = 9 * len(self.mode) + SIDE * SIDE + FILTERS + 8
        return additions * 2.0**-24 * float(_forward(pixels, *map(np.abs, self.weights().values())).max())

    def golden(self) -> Golden:
        pixels = random_pixels(GOLDEN_IMAGES, self.mode)
        encoded = tuple(encode(Image.fromarray(one.squeeze()), "PNG") for one in pixels)
        return Golden(encoded, pixels, self.logits(pixels), self.tolerance(pixels))

    def write(self, models: Path, version: int = 1) -> Path:
        """Write models/<name>/<version>/ and return that folder."""
        folder = models / self.name / str(version)
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(self.model_bytes())
        (folder / "golden.npz").write_bytes(self.golden().to_bytes())
        return folder


def _forward(pixels: np.ndarray, filters: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    padded = np.pad(pixels / 255.0, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = sliding_window_view(padded, (3, 3), axis=(1, 2))  # (N, H, W, C, 3, 3)
    convolved = np.einsum("nhwcij,kcij->nhwk", windows, filters)
    return np.maximum(convolved, 0).mean(axis=(1, 2)) @ matrix.T


def random_pixels(count: int, mode: str = "RGB", side: int = SIDE, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, len(mode)), dtype=np.uint8)


def photo(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Return a smooth image whose every corner differs: lossy formats keep it, and a turn shows."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    planes = [200 * x + 20, 200 * y + 20, 120 * x + 100 * (1 - y)]
    return Image.fromarray(np.stack(planes, axis=-1).round().astype(np.uint8)).convert(mode)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes | None, *, bits: int = 1, colour: int = 0) -> bytes:
    """Return a PNG file by hand (W3C PNG, section 5); rows None leaves the pixels out."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = b"" if rows is None else png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body + png_chunk(b"IEND", b"")


def black_png(side: int) -> bytes:
    """Return a valid 1-bit PNG, side × side: 13,000 a side is 21 KB of file and 169 million pixels."""
    return png(side, side, (b"\0" * (1 + (side + 7) // 8)) * side)


class ScriptedEngine:
    """The real engine, until a test closes its gate or twists its answers; remembers the sizes of its batches."""

    def __init__(self, model_bytes: bytes, device: Device) -> None:
        self._real = open_engine(model_bytes, device)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.twist: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
        self.sizes: list[int] = []

    def describe(self) -> dict[str, object]:
        return self._real.describe()

    def settle(self) -> None:
        self._real.settle()

    def plain_convolutions(self) -> tuple[str, ...]:
        return self._real.plain_convolutions()

    def run(self, images: np.ndarray, threads: int = 1) -> np.ndarray:
        self.sizes.append(len(images))
        self.entered.set()
        assert self.gate.wait(30), "the test forgot to open the gate"
        logits = self._real.run(images, threads)
        return logits if self.twist is None else self.twist(images, logits)

    def close_gate(self) -> None:
        self.sizes.clear()
        self.entered.clear()
        self.gate.clear()


class Engines:
    """Opens scripted engines and keeps them, that a test can reach the one it needs."""

    def __init__(self) -> None:
        self.opened: list[ScriptedEngine] = []

    def __call__(self, model_bytes: bytes, device: Device) -> ScriptedEngine:
        self.opened.append(ScriptedEngine(model_bytes, device))
        return self.opened[-1]


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, at most ten seconds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never happened: {what}")


@asynccontextmanager
async def running(settings: Settings, engines: Engines) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a real app that is ready, on this event loop."""
    app = create_app(settings, open_engine=engines)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service", timeout=30) as client,
    ):
        await until(lambda: app.state.service.status != "loading", "ready")
        assert app.state.service.is_ready
        try:
            yield client
        finally:
            for engine in engines.opened:
                engine.gate.set()


Ask = Callable[..., httpx.Response]


@contextmanager
def serving(settings: Settings, engines: Engines | None = None) -> Iterator[Ask]:
    """Yield a function that asks a real app, which runs on an event loop in another thread."""
    opened = Engines() if engines is None else engines
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(running(settings, opened)) as client:
        yield lambda method, url, **options: portal.call(partial(client.request, method, url, **options))


def assert_problem(response: httpx.Response, status: int, name: str) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["type"] == PROBLEM_TYPE + name
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    return document


def predict_scope(headers: dict[str, str] | None = None) -> dict:
    """Return the ASGI scope of a POST to /predict, for tests that speak to the app by hand."""
    encoded = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    base = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "query_string": b""}
    return {**base, "path": "/predict", "raw_path": b"/predict", "root_path": "", "headers": encoded}
