"""`training.normalization.domains`: shared layers, separate BatchNorm, and ordinary networks out of it."""

import torch
from torch import nn

from training.architectures import build
from training.folding.modules import fold
from training.normalization import batch_norms
from training.normalization.domains import activate, active, of_domain, separate


def network() -> nn.Module:
    torch.manual_seed(0)
    return build("small_cnn", channels=1, classes=3, size=12, bn_momentum=0.5)


def test_a_batch_updates_the_statistics_of_its_domain_alone():
    model = separate(network(), ["left", "right"]).train()
    activate(model, "right")
    model(torch.randn(8, 1, 12, 12) + 2)
    counts = {name: int(norm.num_batches_tracked) for name, norm in batch_norms(model)}
    assert {count for name, count in counts.items() if name.endswith(".left")} == {0}
    assert {count for name, count in counts.items() if name.endswith(".right")} == {1}


def test_convolutions_are_shared_and_gamma_and_beta_are_not():
    plain, model = network(), separate(network(), ["left", "right"])
    convolutions = sum(p.numel() for p in plain.parameters() if p.ndim > 1)
    vectors = sum(p.numel() for _, norm in batch_norms(plain) for p in norm.parameters())
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == convolutions
    assert sum(p.numel() for _, norm in batch_norms(model) for p in norm.parameters()) == 2 * vectors


def test_each_domain_gives_an_ordinary_network_that_answers_alike_and_folds():
    model = separate(network(), ["left", "right"]).train()
    images = {"left": torch.randn(8, 1, 12, 12), "right": torch.randn(8, 1, 12, 12) * 3 + 2}
    for domain, batch in images.items():
        activate(model, domain)
        model(batch)
    model.eval()
    answers = {}
    for domain, batch in images.items():
        plain = of_domain(model, domain)
        assert {type(norm) for _, norm in batch_norms(plain)} == {nn.BatchNorm2d}
        assert set(plain.state_dict()) == set(network().state_dict())
        with active(model, domain):
            answers[domain] = model(batch)
        assert torch.equal(plain(batch), answers[domain])
        folded = fold(plain, batch)
        assert len(folded.folds) == len(list(batch_norms(plain)))
        torch.testing.assert_close(folded.module(batch.double()).float(), answers[domain], rtol=1e-4, atol=1e-4)
    with active(model, "left"):
        assert not torch.allclose(model(images["right"]), answers["right"], atol=1e-3), "domains differ"


def test_what_was_active_is_active_again():
    model = separate(network(), ["left", "right"])
    activate(model, "right")
    with active(model, "left"):
        assert model.block1.norm.active == "left"
    assert model.block1.norm.active == "right"
