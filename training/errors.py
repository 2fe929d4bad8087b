"""What training refuses, as one tree; each text is one line for the person who caused it.

    TrainingError
    ├── UsageError        a preset, key or value of the configuration is wrong
    ├── DataError         a data set is missing or damaged
    ├── RunError          a run folder or checkpoint cannot be used, or training cannot go on
    │   └── Diverged      its loss is not finite
    ├── NotFoldable       a BatchNorm whose statistics cannot be trusted
    ├── FileRefused       a foreign file is not what it should be, or not safe to read
    ├── NotConvertible    a network, or a layer of it, has no exact form
    └── ExportRefused     the artifact does not compute what the trained model computes

What goes wrong while an artifact is read or run is raised from `service.errors`.
"""


class TrainingError(Exception):
    """Its text says what was wrong, what was expected, what to do."""


class UsageError(TrainingError):
    """A preset, key or value of the configuration is wrong."""


class DataError(TrainingError):
    """A data set is missing or damaged."""


class RunError(TrainingError):
    """A run folder or checkpoint cannot be used, or training cannot go on."""


class Diverged(RunError):
    """The loss of training is no longer finite."""


class NotFoldable(TrainingError):
    """A BatchNorm whose statistics cannot be trusted; folding would bake the mistake in."""


class FileRefused(TrainingError):
    """A foreign model file is not what it should be, or not safe to read."""


class NotConvertible(TrainingError):
    """A network, or a layer of it, has no exact form; the float form is not concerned."""


class ExportRefused(TrainingError):
    """The artifact does not compute what the trained model computes."""
