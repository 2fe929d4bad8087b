"""Networks, in reading order, each a classifier of images (N, channels, height, width) → logits.

`blocks` holds what they are made of, with any normalization; one file for each family; any timm name as `timm:NAME`.
"""

from training.architectures.catalogue import ARCHITECTURES, build, check_name

__all__ = ["ARCHITECTURES", "build", "check_name"]
