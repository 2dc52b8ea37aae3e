"""The copy of a pretrained autoencoder in a run's folder, and the basis that it holds."""

import shutil

import torch

from data_pipelines import ShardDataset
from efae.evaluation.fitted_action import FittedAction
from efae.symmetry import D4, Representation
from efae.training.loop import Start, train
from efae.training.starts.source import adopt_action, copy_source, load_source, needs_fit
from tests.unit.training.test_fine_tuning import (
    ALONE,
    IMAGE,
    NOWHERE,
    build,
    configure,
    folders,
    restore,
)
from tests.unit.training.test_training import Keeper, shards

__all__ = ["folders", "shards"]


def make_action(basis: torch.Tensor) -> FittedAction:
    """3A1 + 1B1 in a basis."""
    nothing = {key: {} for key in ("spatial_error", "own_error", "fitted_error")}
    return FittedAction(
        images=0,
        representation=Representation(D4, a1=3, b1=1),
        basis=basis,
        matrices=torch.zeros(8, 4, 4),
        representation_error={},
        variance_by_irrep={},
        **nothing,
    )


def test_a_run_that_began_needs_its_copy_alone(folders, shards, tmp_path):
    moved = tmp_path / "vae"
    build("AutoencoderKL").save_pretrained(moved)
    where = {"ray.storage_uri": str(tmp_path / "runs"), "start.action": "spatial"}
    config = configure(moved, **where)
    assert config.representation.multiplicities == (4, 0, 0, 0, 0)
    copy_source(config, NOWHERE)
    source = load_source(config, ALONE)
    keeper = Keeper(config, tmp_path / "runs" / "mine")
    train(config, ShardDataset.open(shards), ALONE, Start(source=source), keeper)
    moved.rename(tmp_path / "elsewhere")
    assert configure(moved, **where) == config


def test_a_copy_that_was_half_written_is_written_again(folders, tmp_path):
    config = configure(
        folders / "AutoencoderKL",
        **{"ray.storage_uri": str(tmp_path / "runs"), "representation.learned_basis": True},
    )
    copy_source(config, NOWHERE)
    whole = load_source(config, ALONE).state_dict()
    copy = tmp_path / "runs" / "mine" / "source"
    (copy / "manifest.json").unlink()
    (copy / "efae.safetensors").write_bytes(b"")
    copy_source(config, NOWHERE)
    again = load_source(config, ALONE).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())  # and its basis


def test_a_run_starts_in_the_basis_of_its_fitted_action(folders, shards, tmp_path):
    where = {"ray.storage_uri": str(tmp_path / "runs"), "start.action": "fitted"}
    config = configure(folders / "AutoencoderKL", **where)
    assert needs_fit(config)
    matrix = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    config = adopt_action(config, make_action(matrix))
    assert config.representation.multiplicities == (3, 0, 1, 0, 0)
    copy_source(config, NOWHERE)  # keeps the basis
    model = load_source(config, ALONE)
    plain = restore(configure(folders / "AutoencoderKL"))
    with torch.no_grad():
        latent, before = model.encode(IMAGE), plain.encode(IMAGE)
        turned = torch.einsum("ij,bihw->bjhw", matrix.float(), before)
        turned[:, 0] *= torch.sign(torch.linalg.det(matrix)).float()
        torch.testing.assert_close(latent, turned, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.decode(latent), plain.decode(before), atol=1e-5, rtol=0)
    assert needs_fit(configure(folders / "AutoencoderKL", **where))  # nothing has begun
    dataset = ShardDataset.open(shards)
    start = Start(source=load_source(config, ALONE))
    train(config, dataset, ALONE, start, Keeper(config, tmp_path / "runs" / "mine"))
    again = configure(folders / "AutoencoderKL", **where)
    assert again == config  # a run that goes on fits nothing anew
    assert not needs_fit(again)
    changed = configure(folders / "AutoencoderKL", **where, **{"data.resolution": 32})
    assert changed.representation == config.representation
    assert needs_fit(
        configure(folders / "AutoencoderKL", **where, **{"representation.group": "mirror"})
    )


def test_an_attempt_that_ended_before_a_checkpoint_leaves_nothing_to_the_next(folders, tmp_path):
    """Neither the weights of a folder that was replaced, nor the basis of a fit."""
    folder = tmp_path / "vae"
    shutil.copytree(folders / "AutoencoderKL", folder)
    where = {"ray.storage_uri": str(tmp_path / "runs")}
    config = configure(folder, **where, **{"start.action": "fitted"})
    copy_source(config, NOWHERE)
    adopt_action(config, make_action(torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]))
    shutil.rmtree(folder)
    network = build("AutoencoderKL")
    with torch.no_grad():
        network.encoder.conv_in.weight.add_(1)
    network.save_pretrained(folder)
    for settings in (
        {"start.action": "fitted"},
        {"start.action": "split", "representation.learned_basis": True},
    ):
        config = configure(folder, **where, **settings)
        assert needs_fit(config) == (settings["start.action"] == "fitted")
        copy_source(config, NOWHERE)
        found, expected = load_source(config, ALONE), restore(config)
        for name, weight in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], weight), name
