"""Why a proof stops. Control flow between the rules and `proof.prove`; never leaves the package.

Refusal
  × Mixed      the operator's result is not, image by image, a function of that image alone
  × Unproven   it may well be one, but the rules cannot show it
"""

import onnx

EVAL_MODE = "re-export the model in evaluation mode (model.eval(), training=TrainingMode.EVAL)"
STATIC_QUANTIZATION = "quantize statically, with scales from calibration data, instead of dynamically"
SYMBOLIC_BATCH = "re-export with a symbolic batch dimension (dynamic_shapes or dynamic_axes on axis 0)"
OTHER_AXIS = "change the model so that this operator works within one image, then re-export"
ADD_RULE = "rewrite the operator with ones that have a rule, or add a rule for it under a test"


class Refusal(Exception):
    """A reason, as a clause that follows the node's name, and what the user should do about it."""

    def __init__(self, reason: str, remedy: str = OTHER_AXIS) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
        self.node: onnx.NodeProto | None = None  # set by the walk, at the innermost node that refused


class Mixed(Refusal):
    """The result for one image depends on other images, on the slot, on the batch size, or on chance."""


class Unproven(Refusal):
    """No rule shows that the result for one image depends on that image alone."""

    def __init__(self, reason: str, remedy: str = ADD_RULE) -> None:
        super().__init__(reason, remedy)
