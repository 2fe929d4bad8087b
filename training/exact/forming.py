"""The exact form of an artifact that is being written: made, judged against what was asked for, and described."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx

from service.artifact import MANIFEST_KEY
from service.executions import float_twin
from service.golden import Golden
from service.independence.exactness import reference_logits
from service.manifest import ExactRecord, Manifest
from service.wording import counted
from training.errors import ExportRefused, NotConvertible
from training.exact.convert import Converted, Material, convert
from training.exact.options import ExactOptions


@dataclass(frozen=True, slots=True)
class ExactForm:
    """The bytes of `exact.onnx`, the golden images with its answers, and its twin."""

    model_bytes: bytes
    golden: Golden
    twin: bytes | None = None  # the same in float32, where it was asked for


def form_exact(
    float_model: onnx.ModelProto,
    manifest: Manifest,
    golden: Golden,
    material: Material | None,
    options: ExactOptions,
    say: Callable[[str], None],
) -> ExactForm | None:
    """Return the exact form of an artifact, or None where there is none and none is required; tell which and why.

    Raises ExportRefused where it is required and cannot be had, or where its accuracy drops by more than `max_drop`.
    """
    if options.wish == "off":
        return None
    try:
        converted = _converted(float_model, material, say)
    except NotConvertible as error:
        if options.wish == "require":
            raise ExportRefused(f"no exact form: {error}; --exact auto writes the float form alone") from None
        say(f"no exact form: {error}; the float form alone is written")
        return None
    say(describe(converted))
    _check_drop(converted, options.max_drop)
    model = converted.model
    described = manifest.model_copy(update={"exact": converted.record})
    model.metadata_props.add(key=MANIFEST_KEY, value=described.model_dump_json())
    onnx.checker.check_model(model, full_check=True)
    answers = reference_logits(converted.steps, golden.pixels)
    twin = float_twin(model).SerializeToString() if options.float_twin is not None else None
    return ExactForm(model.SerializeToString(), replace(golden, logits_exact=answers), twin)


def _converted(float_model: onnx.ModelProto, material: Material | None, say: Callable[[str], None]) -> Converted:
    if material is None:
        raise NotConvertible("there are no real images to calibrate with; name a folder of them with --data")
    return convert(float_model, material, _Progress(say))


def describe(converted: Converted) -> str:
    """Return the account of a conversion as lines for the terminal."""
    record, tightest = converted.record, converted.exactness.tightest
    wrong = ", ".join(record.differing_executions)
    lines = [
        (
            f"exact form: {counted(len(record.layers), 'layer')}, every sum below 2^24 (tightest: {tightest.name}, "
            f"{tightest.headroom_bits:.1f} bits left)"
        ),
        f"  every execution has the integers' bits on {counted(record.checked_images, 'image')}"
        + (f", except {wrong} on this machine" if wrong else ""),
        f"  the float form's label on {record.agreement:.2%} of "
        + counted(record.calibration_images, "calibration image"),
    ]
    return "\n".join([*lines, *_accuracy_lines(record)])


def _accuracy_lines(record: ExactRecord) -> list[str]:
    if record.accuracy is None or record.float_accuracy is None:
        return ["  no labelled images to judge its accuracy by"]
    tuned = f", {counted(record.fine_tuned_epochs, 'epoch')} of fine-tuning" if record.fine_tuned_epochs else ""
    return [
        (
            f"  accuracy {record.accuracy:.2%}, float form {record.float_accuracy:.2%} "
            f"({counted(record.validation_images, 'validation image')}{tuned})"
        )
    ]


def _check_drop(converted: Converted, max_drop: float) -> None:
    record = converted.record
    if record.accuracy is None or record.float_accuracy is None:
        return
    drop = 100 * (record.float_accuracy - record.accuracy)
    if drop > max_drop:
        raise ExportRefused(
            f"the exact form loses {drop:.2f} points of accuracy ({record.float_accuracy:.2%} → "
            f"{record.accuracy:.2%}), allowed are {max_drop:g}; nothing was written. "
            "--max-drop allows more, --exact off writes the float form alone"
        )


class _Progress:
    """Says each step once, as it begins."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last = ""

    def __call__(self, step: str, _done: float) -> None:
        if step != self._last:
            self._last = step
            self._say(f"exact form: {step} …")
