"""A person's own torch module, named PACKAGE.MODULE:FUNCTION, with its checkpoint → an artifact."""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from service.manifest import Manifest
from service.preprocessing import Preprocessing
from training import card
from training.doctor.checkpoints import Checkpoint, read_checkpoint
from training.doctor.examine import examine
from training.doctor.read import state_subject
from training.doctor.text import as_text
from training.errors import ExportRefused, FileRefused
from training.exact.options import ExactOptions
from training.export import export_network
from training.importing.images import folder_images, folder_material, synthetic_images
from training.importing.labels import read_labels
from training.importing.own_code import call_function, told
from training.importing.preprocessing import Wishes, choose
from training.normalization import batch_norms, norm_records
from training.normalization.layers import taken_apart
from training.packaging import Exported, check_target


@dataclass(frozen=True, slots=True)
class ModuleOrder:
    """What a person asks for: the function that returns the module, its checkpoint, and how pixels are prepared."""

    function: str
    checkpoint: Path
    name: str
    wishes: Wishes
    labels: Path | None = None
    data: Path | None = None


def export_module(
    order: ModuleOrder,
    models: Path,
    *,
    exact: ExactOptions = ExactOptions(),  # noqa: B008 - frozen
    say: Callable[[str], None] = print,
) -> Exported:
    """Write the artifact of a module as the next version of `order.name`.

    Raises UsageError, FileRefused, NotFoldable or ExportRefused; then nothing was written.
    """
    check_target(models, order.name)
    network = load_module(order.function, order.checkpoint, say)
    channels = next((one.in_channels for one in network.modules() if isinstance(one, nn.Conv2d)), 3)
    spec, notes = choose(order.wishes, channels, None)
    for note in notes:
        say(f"note     {note}")
    if order.data is None:
        images, kind = synthetic_images(spec), "synthetic"
        say("note     no --data: checked with made-up images; real ones are a better check")
    else:
        (images, _), kind = folder_images(order.data, spec), card.REAL
    facts = _facts(order, kind)
    labels = read_labels(order.labels, _classes(network, spec))
    records = norm_records(network)
    manifest = Manifest(name=order.name, labels=labels, preprocessing=spec, training=facts, batchnorm=records)
    material = folder_material(order.data, spec, labels) if order.data is not None and exact.wish != "off" else None
    return export_network(network, manifest, images, models, exact=exact, material=material, say=say)


def load_module(function: str, checkpoint: Path, say: Callable[[str], None] = print) -> nn.Module:
    """Call the function, load the checkpoint into what it returns, examine it, and return it in evaluation mode.

    A BatchNorm that also activates is returned as two layers, for the first alone folds.

    Raises UsageError where the function gives no module, FileRefused where the checkpoint is another network's,
    ExportRefused for the doctor's errors.
    """
    network = call_function(function)
    found = read_checkpoint(checkpoint)
    momentum = next((norm.momentum for _, norm in batch_norms(network)), None)
    report = examine(state_subject(checkpoint, found, momentum, "checkpoint"))
    if report.errors:
        say(as_text(report))
        raise ExportRefused(f"{checkpoint} would answer wrongly: {report.errors[0].title}; nothing was written")
    return taken_apart(fit(network, found, checkpoint, function))


def fit(
    network: nn.Module, found: Checkpoint, path: Path, function: str, *, lacking: Collection[str] = ()
) -> nn.Module:
    """Load a checkpoint into its network, and return it in evaluation mode; buffers `lacking` keep their start.

    Raises FileRefused where the checkpoint is another network's.
    """
    own = network.state_dict()
    try:
        network.load_state_dict({**{name: own[name] for name in lacking if name in own}, **found.state})
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise FileRefused(f"{path} does not fit {function}: {reason}") from None
    _compute_weights(network)
    return network.float().eval()


def _compute_weights(network: nn.Module) -> None:
    """Work out, in place, the weights that weight or spectral norm would compute anew for each batch."""
    network.eval()  # in training a spectral norm would move on
    for module in network.modules():
        for hook in list(module._forward_pre_hooks.values()):  # noqa: SLF001 - nothing else tells
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
        for name in list(getattr(module, "parametrizations", ())):
            remove_parametrizations(module, name, leave_parametrized=True)


@torch.no_grad()
def _classes(network: nn.Module, spec: Preprocessing) -> int:
    shape = (2, spec.channels, *spec.size)
    try:
        answer = network(torch.zeros(shape))
    except Exception as error:  # a person's own code may raise anything
        raise FileRefused(
            f"the network cannot take images of shape {shape}: {told(error)}; is --size right?"
        ) from error
    if not isinstance(answer, torch.Tensor) or answer.ndim != 2:
        raise FileRefused("not an image classifier, because it does not return one tensor (batch, classes)")
    return int(answer.shape[1])


def _facts(order: ModuleOrder, kind: str) -> dict[str, Any]:
    return {
        "source": order.checkpoint.name,
        "source_sha256": hashlib.sha256(order.checkpoint.read_bytes()).hexdigest(),
        "producer": order.function,
        "images": kind,
        "versions": {name: version(name) for name in ("foldserve", "torch")},
        "date": datetime.now(UTC).date().isoformat(),
    }
