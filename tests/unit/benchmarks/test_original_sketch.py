"""The baseline does what the original does, quirks included."""

import pytest
import torch

from benchmarks.original_sketch import (
    OriginalSketch,
    build_optimizer,
    drop_condition,
    embed_time,
    rotary_table,
    rotate,
)
from efae.symmetry import MIRROR, check_representation
from efae.symmetry.representation import group_law_error

FLIP = MIRROR["flip_h"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_model(channels: int = 1, **sizes: int) -> OriginalSketch:
    torch.manual_seed(0)
    return OriginalSketch(channels, 16, depth=2, **sizes)


def make_decisive_model() -> OriginalSketch:
    """Its output layer is not zero, so its velocity depends on everything that enters."""
    model = make_model()
    torch.nn.init.normal_(model.decoder.to_patch.weight, std=0.1)
    return model


def random_image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(1)) * 2 - 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch_size", [2, 4])
def test_shapes(channels, patch_size):
    model = make_model(channels, patch_size=patch_size)
    image = random_image(5, channels, 16, 16)
    latent = model.encode(image)
    assert latent.shape == (5, 256, 1, 1)
    assert model.decode(latent, steps=2, seed=0).shape == image.shape
    loss, t = model(image, seeded(0))
    assert loss.shape == t.shape == (5,)
    assert 0 < t.min() < t.max() < 1


def test_sizes_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="resolution=30"):
        OriginalSketch(1, 30)
    with pytest.raises(ValueError, match="hidden_size=96"):
        OriginalSketch(1, 32, hidden_size=96)


def test_equal_seeds_give_equal_numbers():
    model, image = make_decisive_model(), random_image(4, 1, 16, 16)
    assert torch.equal(model(image, seeded(3))[0], model(image, seeded(3))[0])
    assert not torch.equal(model(image, seeded(3))[0], model(image, seeded(4))[0])
    latent = model.encode(image)
    sample = model.decode(latent, steps=2, seed=3)
    assert torch.equal(sample, model.decode(latent, steps=2, seed=3))
    noise = torch.randn(4, 1, 16, 16, generator=seeded(3))
    assert torch.equal(sample, model.decode(latent, steps=2, noise=noise))
    with pytest.raises(ValueError, match="either noise or seed"):
        model.decode(latent)


def test_the_action_is_the_sign_of_the_last_four_dims():
    model = make_model()
    signs = torch.tensor([1.0] * 252 + [-1.0] * 4, dtype=torch.float64)
    matrices = {g.name: model.representation.matrix(g) for g in MIRROR}
    assert torch.equal(matrices["flip_h"], torch.diag(signs))
    assert group_law_error(MIRROR, matrices)[0] == 0
    check_representation(MIRROR, matrices)
    latent = torch.randn(3, 256, 1, 1, generator=seeded(0))
    acted = model.act(FLIP, latent)
    assert torch.equal(acted[:, :252], latent[:, :252])
    assert torch.equal(acted[:, 252:], -latent[:, 252:])
    assert torch.equal(model.act(MIRROR.identity, latent), latent)


def test_one_coin_mirrors_the_whole_batch():
    """An untrained velocity is zero, so the loss is |noise - g image|^2 and shows g."""
    model, image = make_model(), random_image(6, 1, 16, 16)
    seen = []
    for seed in range(12):
        generator = seeded(seed)
        loss, t = model(image, generator)
        generator = seeded(seed)
        assert torch.equal(t, torch.sigmoid(torch.randn(6, generator=generator)))
        noise = torch.randn(image.shape, generator=generator)
        plain, mirrored = ((noise - g.act_on_image(image)).square().mean((1, 2, 3)) for g in MIRROR)
        assert torch.equal(loss, plain) or torch.equal(loss, mirrored)
        seen.append(torch.equal(loss, mirrored))
    assert 2 <= sum(seen) <= 10


def test_loss_is_that_of_the_drawn_path_latent_and_element():
    model, image, elements = make_decisive_model(), random_image(32, 1, 16, 16), set()
    for seed in range(4):
        loss, t = model(image, seeded(seed))
        generator = seeded(seed)
        torch.randn(32, generator=generator)  # the logit of t
        noise = torch.randn(image.shape, generator=generator)
        kept = torch.rand(32, generator=generator) >= 0.1
        assert not kept.all()
        g = MIRROR[int(torch.randint(2, (), generator=generator))]
        elements.add(g)
        latent = model.act(g, model.encode(image)) * kept[:, None, None, None]
        moved, share = g.act_on_image(image), t[:, None, None, None]
        velocity = model.velocity((1 - share) * moved + share * noise, t, latent)
        expected = (velocity - (noise - moved)).square().mean((1, 2, 3))
        assert torch.allclose(loss, expected, atol=1e-5)
    assert len(elements) == 2


def test_a_tenth_of_the_latents_is_dropped_whole():
    kept = drop_condition(torch.ones(20_000, 3, 1, 1), seeded(0)).flatten(1)
    assert torch.equal(kept.amin(1), kept.amax(1))
    assert float(kept.mean()) == pytest.approx(0.9, abs=0.01)


def test_guidance_extrapolates_from_the_zero_latent():
    model, image = make_decisive_model(), random_image(3, 1, 16, 16)
    latent, noise = 5 * model.encode(image), torch.randn(3, 1, 16, 16, generator=seeded(2))
    conditional, null, guided = (
        model.decode(z, steps=1, noise=noise, guidance=guidance)
        for z, guidance in ((latent, 1.0), (torch.zeros_like(latent), 2.0), (latent, 2.0))
    )
    assert (conditional - null).abs().max() > 1e-2
    assert torch.allclose(guided, null + 2 * (conditional - null), atol=1e-5)


def test_sampling_takes_euler_steps_from_noise():
    model, noise = make_decisive_model(), torch.randn(3, 1, 16, 16, generator=seeded(2))
    latent = model.encode(random_image(3, 1, 16, 16))
    with torch.no_grad():
        middle = noise - model.velocity(noise, torch.full((3,), 1.0), latent) / 2
        end = middle - model.velocity(middle, torch.full((3,), 0.5), latent) / 2
    assert torch.allclose(model.decode(latent, steps=2, noise=noise), end, atol=1e-6)


def test_time_is_embedded_unscaled():
    table = embed_time(torch.tensor([0.0, 1.0]))
    assert table.shape == (2, 256)
    assert torch.equal(table[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert float(table[1, 0]) == pytest.approx(0.5403, abs=1e-4)  # cos 1: t is not times 1000


def test_rotary_inner_products_depend_on_the_distance_of_tokens():
    query, key = torch.randn(2, 16, generator=seeded(0))
    table = rotary_table(64, 16)
    scores = rotate(query.expand(64, 16), table) @ rotate(key.expand(64, 16), table).mT
    for distance in (0, 1, 8):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert abs(float(scores[0, 0] - scores[0, 8])) > 1e-2


def test_training_lowers_the_loss_and_reaches_the_encoder():
    model = make_model()
    image = torch.nn.functional.interpolate(random_image(8, 1, 2, 2), scale_factor=8)
    optimizer, losses = build_optimizer(model, 2e-3), []
    for step in range(30):
        optimizer.zero_grad()
        loss = model(image, seeded(step))[0].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(p.grad.abs().max() > 0 for p in model.encoder.parameters())
