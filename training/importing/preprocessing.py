"""How pixels become a foreign model's input: from flags, a torchvision preset, or timm's pretrained_cfg."""

from dataclasses import dataclass

from pydantic import ValidationError

from service.preprocessing import Preprocessing
from training.errors import UsageError
from training.importing.published import Published, published

DEFAULT_SIZE = 224


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the flags say; None is not said."""

    preprocessing: str | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def choose(
    wishes: Wishes, channels: int, size: tuple[int, int] | None, own: Preprocessing | None = None
) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return how pixels are prepared, and notes on what was assumed; `size` is the model's own, None where symbolic.

    Flags win over the file or preset, and that over `own`, what the model says itself. Raises UsageError where they
    contradict the model or themselves.
    """
    said = {} if own is None else own.model_dump()
    found = Published(said) if wishes.preprocessing is None else published(wishes.preprocessing)
    base, notes = found.values, list(found.notes)
    if wishes.mean is None and wishes.std is None and "mean" not in base:
        notes.append("no --mean and no --std: pixels are scaled to 0–1 and nothing else (mean 0, std 1)")
    if wishes.size is None and "size" not in base and size is None:
        notes.append(f"the file leaves the size open and there is no --size: {DEFAULT_SIZE} × {DEFAULT_SIZE}")
    wanted = (wishes.size, wishes.size) if wishes.size else base.get("size") or size or (DEFAULT_SIZE,) * 2
    if size is not None and wanted != size:
        raise UsageError(f"the model takes {size[0]} × {size[1]} pixels, not {wanted[0]} × {wanted[1]}")
    if wishes.size is not None and "resize_to" in base and base["resize_to"] < wishes.size:
        base["resize_to"] = wishes.size
    values = {"resize": "exact", "filter": "bilinear", **base, "mode": "L" if channels == 1 else "RGB", "size": wanted}
    values |= {"mean": _per_channel(wishes.mean or base.get("mean") or (0.0,), channels)}
    values |= {"std": _per_channel(wishes.std or base.get("std") or (1.0,), channels)}
    try:
        return Preprocessing(**values), tuple(notes)
    except ValidationError as error:
        raise UsageError(f"preprocessing: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) * channels if len(values) == 1 else tuple(values)
