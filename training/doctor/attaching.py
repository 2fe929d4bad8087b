"""Gives a checkpoint its network: its BatchNorm layers by their own word, and a graph that images can run through."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.doctor.graph import norm_nodes
from training.doctor.norms import Layer, Subject
from training.errors import FileRefused, UsageError
from training.export import OPSET, quiet
from training.importing.module import fit
from training.importing.own_code import call_function
from training.importing.preprocessing import Wishes, choose
from training.normalization import batch_norms
from training.normalization.domains import DomainNorm, activate
from training.run import load_run

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint's network comes from: a function PACKAGE.MODULE:FUNCTION, or its run folder.

    A run's data set is looked for in `data_dir`; images run through the BatchNorm of `domain`.
    """

    function: str | None = None
    data_dir: Path | None = None
    domain: str | None = None


def attach(
    subject: Subject, source: Source, wishes: Wishes, *, for_images: bool, say: Callable[[str], None]
) -> tuple[Subject, Wishes]:
    """Return a checkpoint's subject with its network, and how its images are prepared.

    A run folder knows its network and its preprocessing. An ONNX file is a graph already and comes back as it is.
    `for_images`: make a graph too; layers that it never calls come last.
    Raises UsageError where there is no network to be had, or nobody says which domain's BatchNorm the images are for;
    FileRefused where it is another one; DataError where a run's data set is gone.
    """
    path = Path(subject.path)
    if subject.checkpoint is None:
        _refuse_for_graph(path, source)
        return subject, wishes
    if source.function is None and not path.is_dir():
        raise UsageError(
            f"{path} has no graph to run images through; name its network: --network PACKAGE.MODULE:FUNCTION"
        )
    size: tuple[int, int] | None = None
    if source.function is not None:
        network = call_function(source.function)
        lacking = [f"{name}.{word}" for name, _ in batch_norms(network) for word in BUFFERS]
        network = fit(network, subject.checkpoint, path, source.function, lacking=lacking)
    else:
        trained = load_run(path, source.data_dir)
        network, size = trained.network, trained.dataset.preprocessing.size
        wishes = replace(wishes, mean=wishes.mean or trained.pixels.mean, std=wishes.std or trained.pixels.std)
    attached = _with_network(subject, network)
    if not for_images:
        return attached, wishes
    _choose_domain(path, network, source.domain)
    spec, notes = choose(wishes, _channels(network), size)
    for note in notes:
        say(f"note     {note}")
    model = as_graph(network, spec.size)
    return replace(attached, model=model, layers=_in_order(attached.layers, model)), wishes


def as_graph(network: nn.Module, size: tuple[int, int]) -> onnx.ModelProto:
    """Convert a network, BatchNorm and all, for images (batch, channels, *size); each BatchNorm keeps its name.

    The exporter's optimizer stays off, for it folds BatchNorm away. Raises FileRefused for what cannot be converted.
    """
    try:
        with quiet():
            program = torch.onnx.export(
                network.eval(),
                (torch.zeros(2, _channels(network), *size),),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter runs the network's own code, which may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise FileRefused(f"the network cannot be converted to run images through it: {reason}") from error
    assert program is not None
    model = program.model_proto  # made anew at each access
    _name_norms(model)
    return model


def _with_network(subject: Subject, network: nn.Module) -> Subject:
    """Let the network tell names, momentum and eps; layers whose statistics the file lacks come without numbers."""
    known = {layer.name: layer for layer in subject.layers}
    layers = tuple(_told(known.get(name, Layer(name)), norm) for name, norm in batch_norms(network))
    missing = tuple(layer.name for layer in layers if layer.name not in known)
    return replace(subject, layers=layers, missing=missing, network=network)


def _told(layer: Layer, norm: _BatchNorm) -> Layer:
    momentum = norm.momentum if layer.momentum is None else layer.momentum
    frozen = layer.frozen or any(one is not None and not one.requires_grad for one in (norm.weight, norm.bias))
    return replace(layer, momentum=momentum, eps=norm.eps, frozen=frozen)


def _channels(network: nn.Module) -> int:
    return next((one.in_channels for one in network.modules() if isinstance(one, nn.Conv2d)), 3)


def _name_norms(model: onnx.ModelProto) -> None:
    """Call each node as its module; a module that is called again gets a number."""
    seen: dict[str, int] = defaultdict(int)
    for node in norm_nodes(model.graph):
        name = node.input[3].removesuffix(".running_mean")
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}, call {seen[name]}"


def _in_order(layers: tuple[Layer, ...], model: onnx.ModelProto) -> tuple[Layer, ...]:
    """Return the layers in the order in which the graph runs them; those that it never calls follow."""
    order = {node.name: place for place, node in enumerate(norm_nodes(model.graph))}
    return tuple(sorted(layers, key=lambda layer: order.get(layer.name, len(order))))


def _refuse_for_graph(path: Path, source: Source) -> None:
    given = {"--network": source.function, "--domain": source.domain, "--data-dir": source.data_dir}
    for flag, value in given.items():
        if value is not None:
            raise UsageError(f"{path} has its own graph; {flag} is for checkpoints and run folders")


def _choose_domain(path: Path, network: nn.Module, domain: str | None) -> None:
    """Let the domain's BatchNorm run. Raises UsageError where it is not named, or there is none of that name."""
    norm = next((one for one in network.modules() if isinstance(one, DomainNorm)), None)
    if norm is None:
        if domain is not None:
            raise UsageError(f"{path} has one BatchNorm for all images; leave out --domain {domain}")
        return
    names = ", ".join(norm.domains)
    if domain is None:
        raise UsageError(
            f"{path} has BatchNorm for each of {names} of its own; name whose the images are: --domain NAME"
        )
    if domain not in norm.domains:
        raise UsageError(f"{path} has no BatchNorm for --domain {domain}; there are {names}")
    activate(network, domain)
