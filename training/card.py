"""What an export tells people: the fold table, the parity line, and the model card beside the model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from service.columns import aligned
from service.manifest import ExactRecord, FoldError, FoldRecord, KeptRecord, Manifest, Parity
from service.wording import counted

FLOAT16_MAX = 65504.0
REAL = "real"


def fold_table(folds: Iterable[FoldRecord], kept: Iterable[KeptRecord]) -> str:
    """Return one aligned line for each BatchNorm: where it went and how exactly, or why it stays."""
    rows: list[tuple[str, ...]] = [
        ("BatchNorm", "into", "kind", "place", "scale", "largest weight", "fp16 headroom", "float64 error")
    ]
    rows += [_fold_row(record) for record in folds]
    return "\n".join([aligned(rows), *(f"kept  {record.norm}: {record.reason}" for record in kept)])


def parity_line(seen: Parity, kind: str = REAL) -> str:
    """Return what the check saw, in one line."""
    sizes = ", ".join(str(size) for size in seen.batch_sizes)
    return (
        f"ONNX Runtime against unfolded float64 on {counted(seen.images, f'{kind} image')} at batch {sizes}: "
        f"largest difference {seen.max_abs_difference:.2g} (float32 alone: {seen.float32_noise:.2g}), "
        f"{counted(seen.argmax_flips, 'label')} flipped"
    )


def exact_line(record: ExactRecord | None) -> str:
    """Return what the exact form is and costs, in one line."""
    if record is None:
        return "none"
    tightest = min(record.layers, key=lambda layer: layer.headroom_bits)
    judged = (
        f"accuracy {record.accuracy:.2%} against {record.float_accuracy:.2%} of the float form on "
        f"{counted(record.validation_images, 'validation image')}"
        if record.accuracy is not None
        else f"the float form's label on {record.agreement:.2%} of {counted(record.calibration_images, 'image')}"
    )
    return f"{judged}; tightest layer {tightest.name} with {tightest.headroom_bits:.1f} of 24 bits left"


def fold_error_line(error: FoldError) -> str:
    """Return what folding changed end to end, in one line."""
    return (
        f"folded against unfolded float64, relative to the largest logit: {error.float64:.2g} in float64, "
        f"{error.float32:.2g} in float32 (unfolded: {error.float32_unfolded:.2g})"
    )


def model_card(manifest: Manifest, digest: str, folder: Path) -> str:
    """Return the README of a model: what it is for, how good it is, where it comes from, how to use it."""
    spec = manifest.preprocessing
    assert manifest.parity is not None
    facts = (
        ("Labels", ", ".join(manifest.labels)),
        ("Input", f"{spec.size[0]} × {spec.size[1]} pixels, mode {spec.mode}, resize {spec.resize} ({spec.filter})"),
        *_origin(manifest.training),
        ("BatchNorm", f"{len({record.norm for record in manifest.folds})} folded, {len(manifest.kept)} kept"),
        ("Folding", _folding(manifest)),
        ("Parity", parity_line(manifest.parity, manifest.training.get("images", REAL))),
        ("Exact form", exact_line(manifest.exact)),
        ("Licence", str(manifest.licence)),
        ("sha256", f"`{digest}`"),
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return (
        f"# {manifest.name}, version {folder.name}\n\n| | |\n|---|---|\n{table}\n\n## Each BatchNorm\n\n```\n"
        f"{fold_table(manifest.folds, manifest.kept)}\n```\n"
    )


def _folding(manifest: Manifest) -> str:
    if manifest.fold_error:
        return fold_error_line(manifest.fold_error)
    return "not measured" if manifest.folds else "nothing was folded"


def _origin(result: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Tell where the weights come from: a run of foldserve's, or a file of somebody else's."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    if "source" in result:
        return (
            (
                "Imported from",
                f"`{result['source']}`, sha256 `{result['source_sha256']}`, made by {result['producer']}",
            ),
            ("Imported", f"{result['date']}; {versions}"),
        )
    return (
        ("Data", f"{result['dataset']}: {result['split']}"),
        (
            "Test accuracy",
            f"{result['test_accuracy']:.2%} of {counted(result['test_images'], 'image')}, which chose nothing",
        ),
        ("Validation accuracy", f"{result['validation_accuracy']:.2%}, at epoch {result['best_epoch']}"),
        ("Network", f"{result['architecture']}, seed {result['seed']}, {counted(result['epochs'], 'epoch')}"),
        ("Trained", f"{result['date']} in {result['seconds']} s on {result['device']}; {versions}"),
    )


def _fold_row(record: FoldRecord) -> tuple[str, ...]:
    largest = max(record.weight_max, record.bias_max)
    error = "not measured" if record.error is None else f"{record.error:.1e}"
    return (
        record.norm,
        record.into,
        record.kind,
        ", past ".join((record.place, *record.through)),
        f"{record.scale_min:.3g} … {record.scale_max:.3g}",
        f"{record.weight_max:.3g}",
        f"{FLOAT16_MAX / largest:,.0f} ×" if largest else "all 0",
        error,
    )
