"""The action of an encoder's channels: found where it is known, and not where there is none."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import efae
from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.fitted_action import fit_action
from efae.evaluation.measures import to_float
from efae.model.autoencoder import Autoencoder
from efae.symmetry import C4, D4, FLIPS, GROUPS, MIRROR, Group, Representation
from efae.symmetry.nearest_representation import (
    find_nearest_orthogonal,
    find_nearest_representation,
)
from efae.symmetry.representation import IRREPS

SAME_IRREP = {
    "D4": {},
    "C4": {"a2": ["a1"], "b2": ["b1"]},
    "flips": {"b1": ["a1"], "b2": ["a2"]},
    "mirror": {"b1": ["a1"], "b2": ["a2"], "e": ["a1", "a2"]},
    "trivial": {"a2": ["a1"], "b1": ["a1"], "b2": ["a1"], "e": ["a1", "a1"]},
}
"""What stands for an irrep that the group does not tell apart from earlier ones."""


def told_apart(rho: Representation) -> dict[str, int]:
    """The multiplicities that can be seen from the matrices."""
    seen = dict.fromkeys(IRREPS, 0)
    for irrep, count in rho.multiplicities.items():
        for name in SAME_IRREP[rho.group.name].get(irrep, [irrep]):
            seen[name] += count
    return seen


def draw_basis(dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]


def matrices(rho: Representation, basis: Tensor) -> Tensor:
    return torch.stack([basis @ rho.matrix(g) @ basis.T for g in rho.group])


def agreement(rho: Representation, basis: Tensor, targets: Tensor) -> float:
    return float((matrices(rho, basis) * targets).sum())


SMALL = [split for split in itertools.product((0, 1), repeat=5) if any(split)]
LARGE = [(8, 2, 3, 3, 8), (0, 0, 0, 0, 6), (3, 0, 5, 1, 2), (0, 4, 0, 4, 4), (2, 7, 1, 0, 0)]


@pytest.mark.parametrize("group", GROUPS.values(), ids=str)
def test_every_representation_in_a_random_basis_is_found(group):
    for split in (*SMALL, *LARGE):
        rho = Representation(group, **dict(zip(IRREPS, split, strict=True)))
        targets = matrices(rho, draw_basis(rho.dim))
        found, basis = find_nearest_representation(group, targets)
        assert found.multiplicities == told_apart(rho)
        assert torch.allclose(basis.T @ basis, torch.eye(rho.dim, dtype=torch.float64))
        assert torch.allclose(matrices(found, basis), targets, atol=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_for_a_mirror_the_nearest_is_known_in_closed_form(seed):
    targets = torch.stack([torch.eye(6, dtype=torch.float64), draw_basis(6, seed)])
    nearest = find_nearest_representation(MIRROR, targets)
    eigenvalues = torch.linalg.eigvalsh((targets[1] + targets[1].T) / 2)
    assert agreement(*nearest, targets) == pytest.approx(6 + float(eigenvalues.abs().sum()))


@pytest.mark.parametrize("group", [D4, C4, FLIPS], ids=str)
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_what_is_found_in_noise_is_at_least_as_near_as_what_was_there(group, noise):
    for seed in range(4):
        rho = Representation(group, a1=1, a2=1, b1=1, e=1)
        basis = draw_basis(rho.dim, seed)
        generator = torch.Generator().manual_seed(seed)
        disturbance = torch.randn(len(group), rho.dim, rho.dim, generator=generator)
        targets = matrices(rho, basis) + noise * disturbance
        assert agreement(*find_nearest_representation(group, targets), targets) >= agreement(
            rho, basis, targets
        )


def climb(rho: Representation, targets: Tensor, seed: int) -> float:
    """The agreement of a representation in the basis where an ascent from a random one ends."""
    rhos = torch.stack([rho.matrix(g) for g in rho.group])
    basis = draw_basis(rho.dim, seed)
    for _ in range(60):
        slope = (targets @ basis @ rhos.mT + targets.mT @ basis @ rhos).sum(0)
        basis = find_nearest_orthogonal(slope + len(rhos) * basis)
    return agreement(rho, basis, targets)


@pytest.mark.parametrize("group", [C4, FLIPS], ids=str)
def test_among_random_matrices_it_is_the_best_of_all_multiplicities(group):
    other = "b1" if group is C4 else "a2"
    splits = [(4 - 2 * e - n, n, e) for e in range(3) for n in range(5 - 2 * e)]
    for seed in range(3):
        targets = torch.stack([draw_basis(4, 10 * seed + i) for i in range(len(group))])
        found = agreement(*find_nearest_representation(group, targets), targets)
        for a1, count, e in splits:
            rho = Representation(group, a1=a1, e=e, **{other: count})
            assert max(climb(rho, targets, start) for start in range(4)) <= found + 1e-4


@dataclass
class Encoder:
    """A tokenizer without a decoder: `latent_of` maps images to latents that `rho` acts on.

    Latents are in the basis `turn`.
    """

    representation: Representation
    latent_of: Any
    turn: Tensor | None = field(default=None)

    @property
    def group(self) -> Group:
        return self.representation.group

    def _turned(self, latent: Tensor, matrix: Tensor | None) -> Tensor:
        if matrix is None:
            return latent
        return torch.einsum("ij,bjhw->bihw", matrix, latent.double())

    def encode(self, image):
        return self._turned(self.latent_of(image), self.turn)

    def act(self, element, latent):
        back = self._turned(latent, None if self.turn is None else self.turn.T)
        return self._turned(self.representation.act(element, back), self.turn)

    def decode(self, latent, steps=None, noise=None, seed=None):
        raise NotImplementedError


def draw_images(count: int = 12, size: tuple[int, int] = (16, 16)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def build_model(group: str, split: tuple[int, ...], **changes) -> Autoencoder:
    """A model of level exact with random weights, none of them zero."""
    sizes = {"data.resolution": 16, "model.hidden_size": 16, "model.num_heads": 2}
    sizes |= {"model.depth": 1, "model.encoder_hidden_size": 32}
    sizes |= {"representation.group": group, "representation.multiplicities": split}
    dim = sum(split) + split[-1]
    sizes |= {"representation.dim": dim, "model.downsampling": 4, "model.level": "exact"}
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), sizes | changes)).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False)


MODELS = [
    *(("D4", split) for split in [(4, 0, 0, 0, 0), (3, 1, 1, 1, 3), (4, 0, 2, 2, 4)]),
    *(("D4", split) for split in [(3, 3, 0, 2, 1), (3, 0, 0, 0, 1), (3, 1, 2, 2, 0)]),
    *(("C4", split) for split in [(3, 0, 2, 0, 2), (3, 2, 1, 3, 1), (4, 0, 0, 0, 0)]),
    *(("flips", split) for split in [(4, 4, 0, 0, 0), (3, 1, 1, 1, 2), (3, 0, 0, 0, 3)]),
    *(("mirror", split) for split in [(4, 4, 0, 0, 0), (5, 1, 0, 0, 0), (3, 1, 1, 1, 1)]),
    ("trivial", (6, 0, 0, 0, 0)),
]


@pytest.mark.parametrize(("group", "split"), MODELS)
def test_an_exact_model_gives_back_its_representation_in_any_basis(group, split):
    model = build_model(group, split)
    rho = model.representation
    turn = draw_basis(rho.dim)
    for tokenizer, basis in [
        (model, torch.eye(rho.dim, dtype=torch.float64)),
        (Encoder(rho, model.encode, turn), turn),
    ]:
        fitted = fit_action(tokenizer, draw_images())
        assert fitted.representation.multiplicities == told_apart(rho)
        assert torch.allclose(
            matrices(fitted.representation, fitted.basis), matrices(rho, basis), atol=1e-3
        )
        for errors in (fitted.own_error, fitted.fitted_error, fitted.representation_error):
            assert max(errors.values()) < 1e-9
        assert sum(fitted.variance_by_irrep.values()) == pytest.approx(1)


def test_the_built_in_model_gives_back_its_representation():
    model = efae.load("builtin:openmoji-32")
    fitted = fit_action(model, draw_images(8, (32, 32)))
    assert fitted.representation.multiplicities == model.representation.multiplicities
    assert max(fitted.representation_error.values()) < 1e-9
    assert min(e for g, e in fitted.spatial_error.items() if g != "identity") > 0.1


def test_errors_are_those_of_the_definition_for_any_batch_size():
    """On images that are not square, too, and for an encoder that has no action."""
    model = build_model("D4", (3, 1, 1, 1, 1), **{"model.level": "none"})
    images = draw_images(6, (16, 24))
    fitted = fit_action(model, images, batch_size=4)
    image = to_float(images)
    latents = {g: model.encode(g.act_on_image(image)).double() for g in D4}
    spread = float(latents[D4.identity].var(0).mean())
    rho, q = fitted.representation, fitted.basis
    for i, g in enumerate(D4):
        for errors, matrix in [
            (fitted.spatial_error, torch.eye(rho.dim, dtype=torch.float64)),
            (fitted.own_error, model.representation.matrix(g)),
            (fitted.fitted_error, fitted.matrices[i]),
            (fitted.representation_error, q @ rho.matrix(g) @ q.T),
        ]:
            differences = [
                latents[g @ h] - torch.einsum("ij,bjhw->bihw", matrix, g.act_on_image(latents[h]))
                for h in D4
            ]
            squares = [float(difference.square().mean()) for difference in differences]
            assert errors[g.name] == pytest.approx(sum(squares) / 8 / spread, rel=1e-5, abs=1e-9)
        assert fitted.fitted_error[g.name] == pytest.approx(fitted.fitted_error[g.inverse.name])
        assert fitted.fitted_error[g.name] <= fitted.representation_error[g.name] + 1e-9
    total = sum(fitted.representation_error.values())
    assert total <= min(sum(fitted.spatial_error.values()), sum(fitted.own_error.values())) + 1e-9
    again = fit_action(model, images, batch_size=6)
    assert again.representation.multiplicities == rho.multiplicities
    assert again.numbers()["representation_error"] == pytest.approx(
        fitted.numbers()["representation_error"]
    )


def test_latents_without_an_action_keep_a_large_error():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3 * 16 * 16, 4 * 16, generator=generator)

    def latent_of(image):
        return (image.flatten(1) @ weights).view(-1, 4, 4, 4)

    fitted = fit_action(Encoder(Representation(D4, a1=4), latent_of), draw_images(64))
    for errors in (fitted.fitted_error, fitted.representation_error):
        assert min(error for g, error in errors.items() if g != "identity") > 1
    assert fitted.own_error == pytest.approx(fitted.spatial_error)


def test_a_mean_lies_in_an_invariant_channel_and_so_does_a_channel_that_is_never_used():
    """The channels: a mean and brightness, nothing, and the gradient inside a cell."""
    rho = Representation(D4, a1=2, e=1)

    def latent_of(image):
        grey = image.double().mean(1, keepdim=True)
        ramp = torch.tensor([-3.0, -1, 1, 3], dtype=torch.float64).repeat(4)
        brightness, x, y = (
            torch.nn.functional.avg_pool2d(values, 4)
            for values in (grey, grey * ramp, -grey * ramp[:, None])
        )
        return torch.cat([brightness + 10, 0 * brightness, x, y], 1)

    fitted = fit_action(Encoder(rho, latent_of, draw_basis(4)), draw_images())
    assert fitted.representation.multiplicities == rho.multiplicities
    assert max(fitted.own_error.values()) < 1e-20
    assert max(fitted.representation_error.values()) < 1e-9


def test_one_image_and_latents_that_are_not_finite_are_refused():
    encoder = Encoder(Representation(D4, a1=3), lambda image: image * torch.nan)
    with pytest.raises(ValueError, match="takes two or more"):
        fit_action(encoder, draw_images(1))
    with pytest.raises(ValueError, match="not finite"):
        fit_action(encoder, draw_images(2))
