"""What stands before each BatchNorm of a checkpoint's network, read from its traced graph."""

import torch
from torch import nn
from torch.nn import functional
from training_support import aged

from training.doctor.network import examine_network


def found(network: nn.Module) -> dict[str, tuple[str, ...]]:
    return {finding.check: finding.where for finding in examine_network(aged(network))}


def test_convolutions_without_bias_and_dropout_behind_are_healthy():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten())
    assert found(network) == {}


def test_a_bias_right_before_a_batchnorm_is_named_past_what_changes_nothing():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    assert found(network) == {"bias-before": ("2",)}


def test_dropout_right_before_a_batchnorm_is_named_as_module_and_as_function():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            return self.norm(functional.dropout(images, 0.2, self.training))

    assert found(nn.Sequential(nn.Dropout2d(), nn.BatchNorm2d(3))) == {"dropout-before": ("1",)}
    assert found(Functional()) == {"dropout-before": ("norm",)}


def test_a_network_that_cannot_be_traced_gives_no_finding():
    class Asks(nn.Module):
        def forward(self, images):
            return images if bool((images > 0).all()) else torch.zeros_like(images)

    assert found(Asks()) == {}
