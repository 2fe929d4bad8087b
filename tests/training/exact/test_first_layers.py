"""What reads the pixels first, where that is not one convolution alone."""

import numpy as np
import torch
from torch import Tensor, nn

from training.exact.convert import Material, convert
from training.export import Classifier, to_onnx
from training.loop import Normalize


class TwoFirst(nn.Module):
    """Two convolutions read the pixels, as in RepVGG."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.wide(images) + self.narrow(images)).mean((2, 3)))


def test_pixels_that_two_layers_read_become_one_layer_with_a_name_of_its_own() -> None:
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    model = to_onnx(Classifier(Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), TwoFirst()), images[:2])
    converted = convert(model, Material(images))
    names = [node.name for node in converted.model.graph.node]
    assert len(set(names)) == len(names)
    assert converted.record.differing_executions == ()
