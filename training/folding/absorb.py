"""Finds, for each scale and shift of a network, the layers that can take it in, and lets them.

First against the stream, into what feeds it; then with the stream, into whatever reads it. All its layers take it or
none does: a search only looks, and raises `Stays` at the first obstacle.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from service.manifest import FoldRecord, KeptRecord
from training.folding.algebra import Affine, Array
from training.folding.network import Account, Join, Layer, Other, Passage, Place, Rescale, Step, Value
from training.folding.passages import Change, Stays

FLOAT16_MAX = 65504.0
FARTHEST = 100  # steps that a change may pass; networks have a handful, and Python's stack ends


@dataclass(frozen=True, slots=True)
class Absorbed:
    """A scale and shift that went into a step, on its "after" or "before" side, past the steps `through`."""

    account: Account
    into: Layer | Rescale
    place: Place
    through: tuple[Step, ...]

    @property
    def witness(self) -> Value:
        """The first value after it that holds the numbers of one that was in the network before."""
        value = self.into.output
        while not value.stands_for:
            value = value.users[0].output
        return value


@dataclass(frozen=True, slots=True)
class _Edit:
    step: Layer | Rescale
    place: Place
    through: tuple[Step, ...]
    weights: tuple[Array, Array | None] | None = None
    affine: Affine | None = None


@dataclass(slots=True)
class Outcome:
    """What folding did to a network: one entry for each scale and shift and each layer that holds it now."""

    absorbed: list[Absorbed] = field(default_factory=list)
    kept: list[KeptRecord] = field(default_factory=list)

    def records(self) -> tuple[FoldRecord, ...]:
        """Return the account of `absorbed`, in its order."""
        return tuple(_record(absorbed) for absorbed in self.absorbed)


def absorb(steps: Sequence[Step]) -> Outcome:
    """Fold what can be folded of a network whose steps come in the order of the stream; the steps are changed."""
    outcome = Outcome()
    for step in steps:
        if isinstance(step, Rescale):
            _absorb_one(step, outcome)
    outcome.absorbed = [final for absorbed in outcome.absorbed for final in _final(absorbed, outcome.absorbed)]
    return outcome


def _absorb_one(rescale: Rescale, outcome: Outcome) -> None:
    try:
        edits, place = _find(rescale)
    except Stays as obstacle:
        if rescale.notable:
            outcome.kept += [KeptRecord(norm=account.name, reason=str(obstacle)) for account in rescale.accounts]
        return
    for edit in edits:
        _apply(edit)
        outcome.absorbed += [Absorbed(account, edit.step, place, edit.through) for account in rescale.accounts]
    _remove(rescale, takes_name=place == "after" and bool(edits))


def _find(rescale: Rescale) -> tuple[list[_Edit], Place]:
    """Return what must change for the rescale to go, on which side of it the layers are. Raises Stays."""
    if rescale.locked:
        raise Stays(rescale.locked)
    if rescale.affine.is_identity and rescale.output.escapes:
        raise Stays("it changes nothing, but its output is an output of the network")
    try:
        return list(_against_stream(rescale.inputs[0], rescale.change, ())), "after"
    except Stays as obstacle:
        try:
            return list(_with_stream(rescale.output, rescale.change, ())), "before"
        except Stays as other:
            raise Stays(f"{obstacle}; nor can what follows take it: {other}") from None


def _final(absorbed: Absorbed, everything: Sequence[Absorbed]) -> Iterator[Absorbed]:
    """Yield where it is now, where what took it in went elsewhere later."""
    into = absorbed.into
    if isinstance(into, Layer) or not into.removed:
        yield absorbed
        return
    for later in everything:
        if later.account is into.accounts[0]:
            yield from _final(replace(later, account=absorbed.account), everything)


def _against_stream(value: Value, change: Change, through: tuple[Step, ...]) -> Iterator[_Edit]:
    """Yield what must change for `change`, applied to `value`, to be dropped. Raises Stays."""
    if change.affine.is_identity:
        return
    _check_way(through)
    step = value.producer
    if step is None:
        raise Stays("what feeds it is neither a convolution nor a linear layer, but an input")
    if not value.is_private:
        raise Stays(f"the output of {step.name} is used elsewhere too")
    if isinstance(step, Layer | Rescale):
        yield _edit(step, change, "after", through)
    elif isinstance(step, Passage):
        yield from _against_stream(step.inputs[0], step.rule.backward(change), (*through, step))
    elif isinstance(step, Join):
        for branch, part in zip(step.inputs, _shares(step, change), strict=True):
            yield from _against_stream(branch, part, (*through, step))
    else:
        note = step.note if isinstance(step, Other) and step.note else f"{step.kind} {step.name}"
        raise Stays(f"what feeds it is neither a convolution nor a linear layer, but {note}")


def _with_stream(value: Value, change: Change, through: tuple[Step, ...]) -> Iterator[_Edit]:
    """Yield what must change for `value` to lack `change` and what reads it to notice nothing. Raises Stays."""
    if change.affine.is_identity:
        return
    _check_way(through)
    if value.escapes or not value.users:
        raise Stays("its output is an output of the network")
    for step in value.users:
        if isinstance(step, Layer | Rescale):
            yield _edit(step, change, "before", through)
        elif isinstance(step, Passage):
            yield from _with_stream(step.output, step.rule.forward(change), (*through, step))
        else:
            raise Stays(f"{step.kind} {step.name} reads it, not only convolutions and linear layers")


def _check_way(through: tuple[Step, ...]) -> None:
    if len(through) > FARTHEST:
        raise Stays(f"more than {FARTHEST} steps lie between")


def _edit(step: Layer | Rescale, change: Change, place: Place, through: tuple[Step, ...]) -> _Edit:
    if isinstance(step, Layer):
        return _Edit(step, place, through, weights=step.check(change, place))
    return _Edit(step, place, through, affine=step.check(change, place))


def _shares(join: Join, change: Change) -> list[Change]:
    if join.axis is None:
        return _terms(join, change)
    if change.axis != join.axis:
        return [change] * len(join.inputs)
    widths = [value.shape[join.axis] if value.shape else None for value in join.inputs]
    if None in widths:
        raise Stays(f"the number of channels that each branch gives {join.name} is not known")
    ends = np.cumsum([width or 0 for width in widths]).tolist()
    return [Change(change.affine.part(start, end), change.axis) for start, end in zip([0, *ends], ends, strict=False)]


def _terms(join: Join, change: Change) -> list[Change]:
    """Scale every term and shift the first: s·(a ± b) + t = (s·a + t) ± s·b."""
    scale, axis = change.affine.scale, change.axis
    ranks = {value.rank for value in join.inputs}
    if axis is not None and not (len(ranks) == 1 and all(_has_width(value, axis, len(scale)) for value in join.inputs)):
        raise Stays(f"the terms of {join.name} are not known to have the same channels")
    rest = Change(Affine(scale, np.zeros_like(scale)), axis)
    return [change, *[rest] * (len(join.inputs) - 1)]


def _has_width(value: Value, axis: int, width: int) -> bool:
    return value.shape is not None and axis < len(value.shape) and value.shape[axis] in {None, width}


def _apply(edit: _Edit) -> None:
    if isinstance(edit.step, Layer):
        assert edit.weights is not None
        edit.step.weight, edit.step.bias = edit.weights
    else:
        assert edit.affine is not None
        edit.step.affine = edit.affine
    edit.step.changed = True
    for step in (edit.step, *edit.through) if edit.place == "after" else edit.through:
        step.output.stands_for = ""


def _remove(rescale: Rescale, *, takes_name: bool) -> None:
    """Let what reads the output read the input, which `takes_name` of the output where it now holds its numbers."""
    source, target = rescale.inputs[0], rescale.output
    source.users.remove(rescale)
    source.users += target.users
    for user in target.users:
        user.inputs = [source if value is target else value for value in user.inputs]
    if takes_name:
        source.name, source.stands_for, source.escapes = target.name, target.stands_for, target.escapes
    rescale.removed = True


def _record(absorbed: Absorbed) -> FoldRecord:
    step, account = absorbed.into, absorbed.account
    layer_weights = (step.weight, step.bias) if isinstance(step, Layer) else (step.affine.scale, step.affine.shift)
    weight, bias = (0.0 if one is None else float(np.abs(one).max(initial=0)) for one in layer_weights)
    return FoldRecord(
        norm=account.name,
        norm_kind=account.kind,
        into=step.name,
        kind=step.kind,
        place=absorbed.place,
        through=tuple(step.name for step in absorbed.through),
        scale_min=account.scale_min,
        scale_max=account.scale_max,
        weight_max=weight,
        bias_max=bias,
        float16_headroom=FLOAT16_MAX / max(weight, bias) if weight or bias else None,
    )
