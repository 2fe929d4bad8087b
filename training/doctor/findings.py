"""What the doctor may find: each check with its severity, its explanation and its mend, in one table."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA = 1  # of the report as JSON: keys are added, never renamed or dropped, without another number
Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that is looked for; errors are what gives wrong answers."""

    severity: Severity
    title: str
    explanation: str
    mend: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A check that found something: where, and what was seen there."""

    check: str
    observed: str
    where: tuple[str, ...] = ()
    severity: Severity = "warning"
    title: str = ""
    explanation: str = ""
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The examination of one file; `data` holds what its images showed, where some were given."""

    path: str
    kind: str
    layers: int
    folded: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that give wrong answers."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The rest."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {"schema": SCHEMA, **asdict(self), "errors": len(self.errors), "warnings": len(self.warnings)}


def finding(check: str, observed: str, where: Iterable[str] = ()) -> Finding:
    """Return a finding with the words of its check."""
    known = CHECKS[check]
    return Finding(check, observed, tuple(where), known.severity, known.title, known.explanation, known.mend)


CHECKS = {
    "statistics-missing": Check(
        "error",
        "running statistics are missing",
        "A BatchNorm normalises with the mean and variance that training gathered. Only its trainable parameters were "
        "saved; a network that loads this file normalises with mean 0 and variance 1.",
        "save `model.state_dict()`, which holds the buffers, or re-estimate them: `foldserve repair` with --data",
    ),
    "never-updated": Check(
        "error",
        "running statistics were never updated",
        "Mean 0 and variance 1 are what a BatchNorm starts with; no training step has changed them.",
        "load the checkpoint that holds the trained buffers, or re-estimate them: `foldserve repair` with --data",
    ),
    "initial-statistics": Check(
        "error",
        "more than 10% of the initial statistics is left",
        "Each update keeps 1 − momentum of what was there, so n updates leave (1 − momentum)^n of the initial mean 0 "
        "and variance 1 in the running statistics (momentum in PyTorch's sense, 1 − TensorFlow's decay).",
        "`foldserve repair` takes the initial share out exactly; next time train longer, or with a larger momentum",
    ),
    "under-warmed": Check(
        "warning",
        "1 to 10% of the initial statistics is left",
        "The running statistics still lean towards mean 0 and variance 1, because training was short for its momentum.",
        "`foldserve repair` takes the initial share out exactly",
    ),
    "not-finite": Check(
        "error",
        "numbers that are not finite",
        "One NaN or infinity reaches every answer that passes through it. Mixed precision does it when a batch "
        "overflows and the optimizer skips the step but BatchNorm does not.",
        "go back to a checkpoint from before, or re-estimate the statistics: `foldserve repair` with --data",
    ),
    "negative-variance": Check(
        "error",
        "a negative variance",
        "No data has one. Computing E[x²] − E[x]² in float32 gives it, and so does a damaged file.",
        "re-estimate the statistics: `foldserve repair` with --data",
    ),
    "training-mode": Check(
        "error",
        "BatchNorm in training mode",
        "The layer normalises with the statistics of the batch, so an image's answer depends on its neighbours.",
        "call `model.eval()` and export again (training=TrainingMode.EVAL)",
    ),
    "active-dropout": Check(
        "warning",
        "dropout in training mode",
        "It drops elements at random, so an image's answer changes from run to run.",
        "call `model.eval()` and export again (training=TrainingMode.EVAL)",
    ),
    "batch-statistics": Check(
        "error",
        "batch statistics in the graph",
        "The graph computes over the batch axis, so an image's answer depends on its neighbours. An export with "
        "track_running_stats=False does this.",
        "train with track_running_stats=True, call `model.eval()`, and export again",
    ),
    "unproven": Check(
        "warning",
        "independence of the batch is not proved",
        "No rule shows that each operator works within one image; strict serving refuses such a graph.",
        "see the operator that is named; export it with ordinary operators",
    ),
    "unknown-statistics": Check(
        "warning",
        "statistics that cannot be known from the file",
        "They come from the state of a loop, or are computed where the graph runs: whether they are those of training, "
        "were ever updated, or follow the batch, the file does not tell.",
        "export with the statistics as stored weights, or examine the checkpoint",
    ),
    "counters-disagree": Check(
        "warning",
        "layers counted different numbers of batches",
        "A layer that is called twice in a forward pass counts twice, and mixes two statistics in one; a layer that "
        "was frozen or added later counts less.",
        "give each use a BatchNorm of its own, or make sure that the difference is meant",
    ),
    "counters-behind-steps": Check(
        "warning",
        "fewer batches counted than steps taken",
        "The optimizer took more steps than any BatchNorm counted batches: the statistics were frozen, reset or loaded "
        "from elsewhere on the way, and the weights have moved on without them.",
        "make sure that it is meant, and hold the statistics against data: --data FOLDER",
    ),
    "frozen-affine": Check(
        "warning",
        "γ and β frozen while the statistics moved",
        "γ and β are marked as not trained, or still are exactly 1 and 0, and the layer counted batches all the same. "
        "A BatchNorm that is to be frozen keeps its statistics too: these drifted away from what its γ and β are for.",
        "put the frozen layers in evaluation mode while training, or train γ and β",
    ),
    "averaged-weights": Check(
        "warning",
        "averaged weights with statistics of the live network",
        "A moving average of weights is another network than the one that gathered the running statistics. "
        "torch.optim.swa_utils.AveragedModel averages buffers only with use_buffers=True.",
        "re-estimate the statistics of the average: torch.optim.swa_utils.update_bn, or `foldserve repair` with --data",
    ),
    "counter-missing": Check(
        "warning",
        "no count of batches",
        "Without num_batches_tracked nobody can tell how warm the statistics are. PyTorch writes it since 0.4.1.",
        "save with a PyTorch that writes it, or check the statistics against data: --data FOLDER",
    ),
    "tiny-variance": Check(
        "warning",
        "channels with almost no variance",
        "A variance below eps, or a scale above 1000, amplifies rounding and overflows float16; the channel's input is "
        "dead or constant.",
        "look at the layer before it for dead filters; keep float32",
    ),
    "offset-heavy": Check(
        "warning",
        "means far larger than deviations",
        "Where |mean| is 1000 deviations and more, subtracting it costs three decimal digits of float32.",
        "normalise the input, or remove the offset before this layer",
    ),
    "momentum": Check(
        "warning",
        "momentum looks like another convention",
        "PyTorch's momentum is the weight of the new batch, 0.1 by default; TensorFlow's decay is 1 − that. A copied "
        "0.9 follows the last batch, a copied 0.001 hardly moves.",
        "use 1 − decay as PyTorch's momentum, and re-estimate the statistics: `foldserve repair` with --data",
    ),
    "eps": Check(
        "warning",
        "an unusual eps",
        "Usual are 1e-5 (PyTorch) and 1e-3 (Keras); under 1e-7 a dead channel is scaled beyond float16.",
        "make sure that it is the eps of training",
    ),
    "dead-channels": Check(
        "warning",
        "dead channels",
        "γ is 0 here, so these channels tell nothing of the image; a residual block that starts with γ = 0 and was "
        "never trained looks so too.",
        "none is needed for right answers; the channels can be pruned",
    ),
    "negative-gamma": Check(
        "warning",
        "negative γ",
        "Right answers, but such a BatchNorm cannot be folded through a max-pooling before it.",
        "none is needed",
    ),
    "unfolded": Check(
        "warning",
        "BatchNorm left unfolded",
        "A layer before or behind could take this BatchNorm in at no cost. Runtimes do it for some patterns only, and "
        "older ones not from opset 15 (BatchNormalization) or 22 (Conv) on.",
        "`foldserve import` folds it in float64",
    ),
    "fixed-batch": Check(
        "warning",
        "a fixed batch dimension",
        "The file runs one batch size only, so a server can neither gather images nor answer one alone.",
        "export with a symbolic batch (dynamic_shapes or dynamic_axes); `foldserve import` makes it symbolic",
    ),
    "shared-statistics": Check(
        "warning",
        "two BatchNorms share their statistics",
        "Layers that read one and the same mean or variance normalise different data with it; tools that fold one of "
        "them in place have spoiled the other.",
        "give each use a BatchNorm of its own, or make sure that it is meant",
    ),
    "half-statistics": Check(
        "warning",
        "statistics in 16 bits",
        "float16 ends at 65504 and at 6e-8; a variance outside becomes infinite or 0.",
        "keep BatchNorm in float32, or fold before the weights are halved",
    ),
    "overflow": Check(
        "warning",
        "weights beyond float16",
        "A weight over 65504 becomes infinite where the model is run in float16.",
        "keep float32",
    ),
    "opset": Check(
        "warning",
        "an opset outside 9 to 23",
        "The rules of the proof and of the folding were written for those: independence of the batch is not proved, "
        "and `foldserve import` refuses the file.",
        "export again with opset 20, or convert with onnx.version_converter",
    ),
    "bias-before": Check(
        "warning",
        "a bias right before BatchNorm",
        "BatchNorm subtracts the mean and the bias with it; the parameter never mattered.",
        "none is needed; train with bias=False",
    ),
    "dropout-before": Check(
        "warning",
        "dropout right before BatchNorm",
        "Dropout changes the variance in training and not at inference, so the running variance fits only the former "
        "(Li et al. 2019, arXiv 1801.05134).",
        "move the dropout behind the last BatchNorm, or re-estimate the statistics: `foldserve repair` with --data",
    ),
    "drift": Check(
        "warning",
        "running statistics far from the data",
        "On these images some channels have another mean or variance than the file holds: other preprocessing, other "
        "data, or statistics that do not belong to these weights.",
        "check the preprocessing first; then re-estimate: `foldserve repair` with --data",
    ),
    "preprocessing": Check(
        "warning",
        "another preprocessing fits the first BatchNorm better",
        "The first BatchNorm remembers how its input was spread in training; these pixels reach it differently.",
        "use the preprocessing that is named",
    ),
    "accuracy": Check(
        "warning",
        "batch statistics label better than the running ones",
        "On the same images the network answers better when it normalises with the batch itself: the running "
        "statistics do not belong to these weights, or these pixels are prepared otherwise than in training.",
        "check the preprocessing first; then re-estimate: `foldserve repair` with --data",
    ),
}
