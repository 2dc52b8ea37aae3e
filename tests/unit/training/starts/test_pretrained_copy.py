"""The copy of a pretrained autoencoder in a run's folder, and the basis that it holds."""

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
    nothing = {key: {} for key in ("spatial_error", "own_error", "fitted_error")}
    action = FittedAction(
        images=0,
        representation=Representation(D4, a1=3, b1=1),
        basis=matrix,
        matrices=torch.zeros(8, 4, 4),
        representation_error={},
        variance_by_irrep={},
        **nothing,
    )
    config = adopt_action(config, action)
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
    again = configure(folders / "AutoencoderKL", **where)
    assert again == config  # a resubmitted run fits nothing anew
    assert not needs_fit(again)
    for key, value, fits in (
        ("data.decode_threads", 2, False),
        ("data.resolution", 32, True),
        ("representation.group", "mirror", True),
    ):
        changed = configure(folders / "AutoencoderKL", **where, **{key: value})
        assert needs_fit(changed) == fits, key
    dataset = ShardDataset.open(shards)
    start = Start(source=load_source(config, ALONE))
    train(config, dataset, ALONE, start, Keeper(config, tmp_path / "runs" / "mine"))
    begun = configure(folders / "AutoencoderKL", **where, **{"data.resolution": 32})
    assert begun.representation == config.representation
