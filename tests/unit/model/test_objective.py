"""The training loss: its terms, its options, and what each must leave alone."""

import pytest
import torch
from torch import nn

from efae.config import Config
from efae.config.forms import with_overrides
from efae.model import objective
from efae.model.autoencoder import Autoencoder
from efae.model.objective import load_perceptual
from efae.symmetry import D4

SIZES = {
    "data.resolution": 16,
    "representation.multiplicities": (4, 1, 1, 1, 2),
    "representation.dim": 11,
    "model.hidden_size": 32,
    "model.encoder_hidden_size": 32,
    "model.num_heads": 2,
    "model.depth": 1,
    "model.patch_size": 4,
    "model.downsampling": 4,
}
IMAGE = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(**overrides):
    """A model whose weights are random everywhere, also where training starts from zero."""
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), SIZES | overrides))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not parameter.any() and name != "bottleneck.power":
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def loss_of(model, image=IMAGE, seed=0, perceptual=None):
    loss, t = objective.Objective(model, perceptual)(image, torch.Generator().manual_seed(seed))
    assert loss.shape == t.shape == (len(image),)
    assert loss.isfinite().all()
    return loss


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.level": "objective"},
        {"model.level": "regularized"},
        {"model.level": "regularized", "representation.learned_basis": True},
        {"model.bottleneck": "kl"},
        {"model.modulation": "shared"},
        {"flow.condition_drop": 0.3, "flow.prediction": "velocity"},
        {"loss.rotation_probability": 0.5},
        {"loss.scaling_probability": 0.5, "loss.rotation_probability": 0.5},
        {"loss.scaling_probability": 1.0, "model.level": "objective"},
    ],
    ids=str,
)
def test_every_option_trains_and_is_a_function_of_the_seed(overrides):
    model = build(**overrides)
    loss = loss_of(model)
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in ("decoder.null_tokens", "decoder.null_pooled"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    assert torch.equal(loss, loss_of(build(**overrides)))
    assert not torch.equal(loss, loss_of(build(**overrides), seed=1))


@pytest.mark.parametrize("level", ["exact", "objective", "regularized"])
def test_parts_of_a_batch_have_the_losses_of_the_whole(level):
    """In eval mode, since in training every forward pass moves the running power."""
    options = {"loss.rotation_probability": 0.5, "flow.condition_drop": 0.3}
    model = build(**{"model.level": level}, **options).eval()
    draws = objective.draw(model.config, IMAGE.shape, torch.Generator().manual_seed(0))
    whole, _ = objective.Objective(model)(IMAGE, draws)
    for size in range(1, len(IMAGE) + 2):
        pairs = zip(IMAGE.split(size), draws.split(size), strict=True)
        parts = torch.cat([objective.Objective(model)(*pair)[0] for pair in pairs])
        assert torch.allclose(parts, whole, rtol=1e-4)


def test_pair_error_vanishes_where_the_encoder_is_equivariant_and_only_there():
    def error(level):
        model = build(**{"model.level": level})
        with torch.no_grad():
            acted = model.act(D4["rot90"], model.bounded(IMAGE))
            encoded = model.bounded(D4["rot90"].act_on_image(IMAGE))
            return objective.pair_error(encoded, acted, model.bottleneck.mean_power())

    assert error("exact").max() < 1e-10
    assert error("objective").min() > 0.1


def test_pair_error_pulls_on_the_encoding_alone():
    encoded, acted = (torch.randn(2, 4, 2, 2, requires_grad=True) for _ in range(2))
    objective.pair_error(encoded, acted, torch.ones(())).sum().backward()
    assert encoded.grad is not None
    assert acted.grad is None


def test_pair_error_cannot_be_lowered_by_shrinking_the_latent():
    def error_at(scale):
        model = build(**{"model.level": "regularized", "model.bottleneck": "kl"}).train()
        with torch.no_grad():
            for part in (model.encoder.latent.coefficient, model.encoder.linear_path.free):
                part *= scale
            latent = model.bounded(IMAGE)
            for _ in range(1000):  # until the running power has forgotten its start
                model.bottleneck.update_power(latent)
            acted = model.act(D4["rot90"], latent)
            encoded = model.bounded(D4["rot90"].act_on_image(IMAGE))
            return objective.pair_error(encoded, acted, model.bottleneck.mean_power())

    assert torch.allclose(error_at(0.1), error_at(1.0), rtol=1e-2)
    assert error_at(1.0).min() > 0.1


def test_level_regularized_adds_the_weighted_pair_error():
    losses = [
        loss_of(build(**{"model.level": "regularized", "loss.pair_weight": weight}))
        for weight in (0.0, 0.5, 1.0)
    ]
    plain = loss_of(build(**{"model.level": "objective"}))
    assert torch.allclose(losses[0], plain)
    assert (losses[1] - losses[0]).max() > 0.1  # zero where the element drawn is the identity
    assert torch.allclose(losses[2] - losses[0], 2 * (losses[1] - losses[0]), rtol=1e-3)


def test_the_null_condition_is_invariant_and_not_the_zero_latent():
    model = build(**{"flow.condition_drop": 0.1})
    x_t, t = torch.randn(6, 3, 16, 16), torch.linspace(0.1, 1, 6)
    with torch.no_grad():
        null = model.velocity(x_t, t, None)
        zero = model.velocity(x_t, t, torch.zeros(6, 11, 4, 4))
        for g in D4:
            acted = model.velocity(g.act_on_image(x_t), t, None)
            assert torch.allclose(acted, g.act_on_image(null), atol=1e-4)
    assert not torch.allclose(null, zero, atol=1e-2)


def test_without_a_null_condition_there_is_no_guidance():
    with pytest.raises(ValueError, match=r"flow\.condition_drop=0: this model has no null"):
        build().velocity(torch.randn(1, 3, 16, 16), torch.ones(1), None)
    with pytest.raises(ValueError, match=r"flow\.guidance_scale=2\.0.*condition_drop"):
        with_overrides(Config(), {"flow.guidance_scale": 2.0})


def test_scaling_shrinks_image_and_latent_together_by_whole_cells():
    config = build(**{"loss.scaling_probability": 0.5}).config
    sizes = set()
    for seed in range(40):
        draws = objective.draw(config, IMAGE.shape, torch.Generator().manual_seed(seed))
        side = draws.latent_noise.shape[-1]
        assert draws.noise.shape[-1] == 4 * side
        assert draws.cells in (None, (side, side))
        if draws.cells:
            image, small = objective.scale(IMAGE, torch.randn(6, 11, 4, 4), draws.cells)
            assert (image.shape[-1], small.shape[-1]) == (4 * side, side)
        sizes.add(side)
    assert sizes == {1, 2, 3, 4}
    assert objective.find_smallest_side(config) == 4 * min(sizes)
    wide = {"data.buckets": [(64, 32), (48, 96)], "representation.group": "flips"}
    wide = with_overrides(config, wide)  # 16 x 8 cells shrink to 4 x 2
    assert objective.find_smallest_side(wide) == 8
    unscaled = with_overrides(wide, {"loss.scaling_probability": 0.0})
    assert objective.find_smallest_side(unscaled) == 32


def test_every_batch_of_one_generator_has_a_size_of_its_own():
    config = build(**{"loss.scaling_probability": 0.5}).config
    plain = with_overrides(config, {"loss.scaling_probability": 0.0})
    generator, other = (torch.Generator().manual_seed(0) for _ in range(2))
    drawn = [objective.draw(config, IMAGE.shape, generator) for _ in range(40)]
    assert {draws.cells for draws in drawn} == {None, (1, 1), (2, 2), (3, 3)}
    assert drawn[0].t.equal(objective.draw(plain, IMAGE.shape, other).t)
    # The same again from the same seed, and from a state on the way.
    assert objective.draw(config, IMAGE.shape, other.manual_seed(0)).cells == drawn[0].cells
    other.set_state(generator.get_state())
    sizes = [
        [objective.draw(config, IMAGE.shape, g).cells for _ in range(9)] for g in (generator, other)
    ]
    assert sizes[0] == sizes[1]


def test_scaling_commutes_with_the_group():
    model, latent = build(), torch.randn(6, 11, 4, 4)
    for g in D4:
        image, small = objective.scale(IMAGE, latent, (3, 3))
        acted_image, acted = objective.scale(g.act_on_image(IMAGE), model.act(g, latent), (3, 3))
        assert torch.allclose(acted_image, g.act_on_image(image), atol=1e-5)
        assert torch.allclose(acted, model.act(g, small), atol=1e-5)


def test_the_decoder_is_exact_at_every_size():
    model, z = build(), torch.randn(2, 11, 3, 3)
    noise = torch.randn(2, 3, 12, 12)
    sample = model.decode(z, steps=2, noise=noise)
    for g in D4:
        acted = model.decode(model.act(g, z), steps=2, noise=g.act_on_image(noise))
        assert torch.allclose(acted, g.act_on_image(sample), atol=1e-4)


def test_a_vector_latent_cannot_be_scaled():
    with pytest.raises(ValueError, match=r"scaling_probability=0\.5: a 1 x 1 latent"):
        build(**{"loss.scaling_probability": 0.5, "model.downsampling": 16})


def test_rotation_leaves_its_share_and_weighs_the_disk():
    model, latent = build(**{"loss.rotation_probability": 0.5}), torch.randn(512, 11, 4, 4)
    image = torch.rand(512, 3, 16, 16)
    draws = objective.draw(model.config, (512, 3, 16, 16), torch.Generator().manual_seed(0))
    turned, acted, mask = objective.rotate_some(model, image, latent, draws.angle, draws.rotated)
    left = (turned == image).all(-1).all(-1).all(-1)
    assert float(left.float().mean()) == pytest.approx(0.5, abs=0.1)
    assert torch.equal((mask == 1).all(-1).all(-1).flatten(), left)
    assert torch.equal((acted == latent).all(-1).all(-1).all(-1), left)
    assert mask[~left, 0, 0, 0].max() == 0  # a corner lies outside the disk


def test_the_perceptual_term_sees_the_prediction_and_the_image():
    model, seen = build(), []

    def spy(predicted, image):
        seen.append((predicted, image))
        return torch.full((len(image),), 3.0)

    before = loss_of(model)
    assert torch.allclose(loss_of(model, perceptual=spy), before + 0.1 * 3)
    (predicted, image) = seen[0]
    assert torch.equal(image, IMAGE)
    assert predicted.shape == image.shape
    assert predicted.requires_grad


FROZEN = nn.Conv2d(3, 1, 1)


def test_a_perceptual_module_is_found_frozen_and_kept_out_of_the_model():
    model = build()
    perceptual = load_perceptual(f"{__name__}:FROZEN", torch.device("cpu"))
    names = objective.Objective(model, perceptual).state_dict()
    assert not any(parameter.requires_grad for parameter in FROZEN.parameters())
    assert {name.removeprefix("model.") for name in names} == set(model.state_dict())


@pytest.mark.parametrize("path", ["efae.nowhere:lpips", "efae.config:lpips", "efae:__version__"])
def test_a_perceptual_function_that_is_none_is_refused(path):
    with pytest.raises(ValueError, match=rf"loss\.perceptual='{path}'"):
        load_perceptual(path, torch.device("cpu"))


def test_a_basis_is_refused_where_it_would_never_learn():
    with pytest.raises(ValueError, match=r"learned_basis=True at model\.level=exact"):
        build(**{"representation.learned_basis": True})
