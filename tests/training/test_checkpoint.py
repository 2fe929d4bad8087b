"""`training.checkpoint`: what is in the file, that it is whole, and which files are refused."""

from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from training_support import disk_of

from training.architectures import ARCHITECTURES, build
from training.checkpoint import (
    Facts,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    write_atomically,
)
from training.errors import RunError

FACTS = Facts(**{field.name: 3 for field in fields(Facts) if field.default is MISSING})


def _network(name: str = "small_cnn") -> nn.Module:
    model = build(name, channels=1, classes=10, size=28, bn_momentum=0.1).train()
    model(torch.randn(4, 1, 28, 28))  # the statistics leave their initial values
    return model


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_parameter_and_every_batchnorm_buffer_is_in_the_file(tmp_path: Path, name: str):
    model = _network(name)
    save_checkpoint(tmp_path / "best.safetensors", model, FACTS)
    stored = _tensors(tmp_path / "best.safetensors")
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert set(stored) == set(wanted)
    for norm, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                assert torch.equal(stored[f"{norm}.{buffer}"], getattr(module, buffer))


def test_a_checkpoint_restores_every_bit_and_its_facts(tmp_path: Path):
    path = tmp_path / "last.safetensors"
    model, fresh = _network(), _network()
    save_checkpoint(path, model, FACTS)
    facts, optimizer = load_checkpoint(path, fresh)
    assert facts == FACTS
    assert optimizer == {}
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path: Path):
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        images = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    whole, whole_optimizer = fresh()
    for seed in range(4):
        step(whole, whole_optimizer, seed)

    stopped, stopped_optimizer = fresh()
    for seed in range(2):
        step(stopped, stopped_optimizer, seed)
    save_checkpoint(tmp_path / "last", stopped, FACTS, optimizer_tensors(stopped_optimizer))
    resumed, resumed_optimizer = fresh()
    _, tensors = load_checkpoint(tmp_path / "last", resumed)
    restore_optimizer(tmp_path / "last", resumed_optimizer, tensors)
    for seed in range(2, 4):
        step(resumed, resumed_optimizer, seed)
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)


def test_a_failing_write_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "result.json"
    write_atomically(path, b"old" * 100)
    with disk_of(1000), pytest.raises(RunError, match=r"result\.json cannot be written: .*what was there is untouched"):
        write_atomically(path, b"new" * 10_000)
    assert path.read_bytes() == b"old" * 100
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path):
    path = tmp_path / "last.safetensors"
    old = _network()
    save_checkpoint(path, old, FACTS)
    with disk_of(10_000), pytest.raises(RunError, match="cannot be written"):
        save_checkpoint(path, _network(), replace(FACTS, epoch=4))
    model = _network()
    assert load_checkpoint(path, model)[0] == FACTS
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in old.state_dict().items())


@pytest.mark.parametrize("path", ["missing/file", "in-the-way/file"])
def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path: Path, path: str):
    (tmp_path / "in-the-way").write_text("a file")
    with pytest.raises(RunError, match="cannot be written"):
        write_atomically(tmp_path / path, b"content")


def _saved_without(tmp_path: Path, part: str) -> Path:
    """As Keras users know it: only trainable variables were saved."""
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, _network(), FACTS)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: value for name, value in _tensors(path).items() if part not in name}, path, metadata)
    return path


def test_missing_running_statistics_are_named(tmp_path: Path):
    path = _saved_without(tmp_path, "running_")
    with pytest.raises(RunError, match=r"has no .*running_mean; BatchNorm statistics were not saved"):
        load_checkpoint(path, _network())


def test_a_missing_weight_is_named(tmp_path: Path):
    path = _saved_without(tmp_path, "head.bias")
    with pytest.raises(RunError, match=r"has no head\.bias; it belongs to another network$"):
        load_checkpoint(path, _network())


def test_a_refused_checkpoint_changes_nothing_in_the_network(tmp_path: Path):
    path = _saved_without(tmp_path, "head.bias")
    model = _network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RunError):
        load_checkpoint(path, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "other",
    [
        build("small_resnet", channels=1, classes=10, size=28, bn_momentum=0.1),
        build("small_cnn", channels=3, classes=10, size=28, bn_momentum=0.1),
        build("small_cnn", channels=1, classes=9, size=28, bn_momentum=0.1),
    ],
    ids=["architecture", "channels", "classes"],
)
def test_a_checkpoint_of_another_network_is_refused_by_key(tmp_path: Path, other: nn.Module):
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, _network(), FACTS)
    with pytest.raises(RunError, match=r"best\.safetensors(: .* has shape| has no )"):
        load_checkpoint(path, other)


def test_keys_that_the_network_has_not_are_named(tmp_path: Path):
    save_checkpoint(tmp_path / "best", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), FACTS)
    with pytest.raises(RunError, match=r"has 1\.bias, which the network has not"):
        load_checkpoint(tmp_path / "best", nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage that is long enough to have a header", bytes(64), b"\xff" * 64, b"PK\x03\x04" + bytes(60)],
)
def test_a_garbage_file_is_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / "best.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=r"best\.safetensors is not a sound checkpoint"):
        load_checkpoint(tmp_path / "best.safetensors", _network())


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path):
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, _network(), FACTS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="is not a sound checkpoint"):
        load_checkpoint(path, _network())


@pytest.mark.parametrize("metadata", [None, {"foldserve": "no json"}, {"foldserve": "[]"}, {"foldserve": '{"era": 1}'}])
def test_a_safetensors_file_of_someone_else_is_refused(tmp_path: Path, metadata):
    save_file(_network().state_dict(), tmp_path / "theirs", metadata)
    with pytest.raises(RunError, match="is not a sound checkpoint"):
        load_checkpoint(tmp_path / "theirs", _network())


def test_a_missing_file_says_what_to_do(tmp_path: Path):
    with pytest.raises(RunError, match="is missing; train first"):
        load_checkpoint(tmp_path / "best.safetensors", _network())


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_restored_optimizer_state_has_the_memory_layout_of_its_weight(tmp_path: Path, kind: str):
    """Fused kernels on CUDA refuse a state whose strides are not the weight's."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(network.parameters(), lr=0.1, **options)
    network(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "last.safetensors", network, FACTS, optimizer_tensors(optimizer))
    _, tensors = load_checkpoint(tmp_path / "last.safetensors", network)
    fresh = getattr(torch.optim, kind)(network.parameters(), lr=0.1, **options)
    restore_optimizer(tmp_path / "last.safetensors", fresh, tensors)
    large = 0
    for weight, slots in optimizer.state.items():
        for name, wanted in slots.items():
            found = fresh.state[weight][name]
            assert torch.equal(found, wanted)
            assert found.stride() == wanted.stride()
            large += found.ndim == 4
    assert large == (1 if kind == "SGD" else 2), "the convolution's state was looked at"


OPTIMIZERS = {"SGD": {"momentum": 0.9}, "AdamW": {}, "Adagrad": {}}


@pytest.mark.parametrize("theirs", OPTIMIZERS)
@pytest.mark.parametrize("mine", OPTIMIZERS)
def test_the_state_of_another_optimizer_is_refused_by_file_with_the_mend(tmp_path: Path, mine: str, theirs: str):
    network = nn.Linear(3, 2)
    network(torch.ones(1, 3)).sum().backward()
    optimizer = getattr(torch.optim, theirs)(network.parameters(), lr=0.1, **OPTIMIZERS[theirs])
    optimizer.step()
    fresh = getattr(torch.optim, mine)(network.parameters(), lr=0.1, **OPTIMIZERS[mine])
    if mine == theirs:
        restore_optimizer(tmp_path / "last", fresh, optimizer_tensors(optimizer))
        return
    with pytest.raises(RunError, match=rf"last holds .* of another optimizer than {mine}; let config\.json be what"):
        restore_optimizer(tmp_path / "last", fresh, optimizer_tensors(optimizer))


@pytest.mark.parametrize("other", [nn.Linear(3, 4), nn.Linear(3, 2, bias=False)], ids=["shape", "number"])
def test_an_optimizer_s_state_for_other_weights_is_refused(tmp_path: Path, other: nn.Module):
    network = nn.Linear(3, 2)
    network(torch.ones(1, 3)).sum().backward()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    with pytest.raises(RunError, match="last holds an optimizer's state for other weights"):
        restore_optimizer(tmp_path / "last", torch.optim.SGD(other.parameters(), lr=0.1), optimizer_tensors(optimizer))
