"""Rotations by any angle: the laws of O(2), and how near resampling comes to them."""

import math

import pytest
import torch
from torch.nn import functional as F

from efae.evaluation.measures import masked_psnr
from efae.symmetry import C4, D4, FLIPS, GROUPS, Representation
from efae.symmetry.any_angle import act_by_angle, check_turns_by_any_angle, disk_mask, rotate_image
from efae.symmetry.representation import irrep_matrix

GENERATOR = torch.Generator().manual_seed(0)
REPRESENTATIONS = [
    Representation(D4, a1=2, a2=1, b1=3, b2=3, e=2),
    Representation(D4, b1=1, b2=1),
    Representation(D4, e=1),
    Representation(D4, a2=2),
    Representation(C4, a1=1, b1=4, e=1),
    Representation(C4, a1=1, a2=1, b1=3, b2=1, e=2),
]
every_representation = pytest.mark.parametrize("rho", REPRESENTATIONS, ids=repr)
TURNS = [D4[name] for name in ("identity", "rot90", "rot180", "rot270")]


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def draw_angles(count):
    return 4 * math.pi * (torch.rand(count, generator=GENERATOR, dtype=torch.float64) - 0.5)


def assert_laws_on_channels(act, rho, tolerance):
    """O(2) extends the group: theta and phi add, h inverts, quarter turns are the group's."""
    z, theta, phi = draw(64, rho.dim, 1, 1), draw_angles(64), draw_angles(64)
    assert torch.equal(act(rho, 0.0, z), z)
    composed = act(rho, theta, act(rho, phi, z))
    torch.testing.assert_close(composed, act(rho, theta + phi, z), rtol=0, atol=tolerance)
    torch.testing.assert_close(act(rho, 2 * math.pi, z), z, rtol=0, atol=tolerance)
    for k, turn in enumerate(TURNS):
        moved = act(rho, k * math.pi / 2, z)
        torch.testing.assert_close(moved, rho.act(turn, z), rtol=0, atol=tolerance)
    for g in rho.group:
        if g.mirrored:
            conjugated = rho.act(g, act(rho, theta, rho.act(g, z)))
            torch.testing.assert_close(conjugated, act(rho, -theta, z), rtol=0, atol=tolerance)


@every_representation
def test_channels_obey_the_laws_of_o2(rho):
    assert_laws_on_channels(act_by_angle, rho, 1e-12)


def act_by_complex_numbers(b_charge=2, e_charge=1, scale=1.0):
    """The definition with charges of one's choice: u = y - i x of E, b1 + i b2 of the Bs."""

    def act(rho, angle, z):
        counts = rho.multiplicities
        first_b, first_e = counts["a1"] + counts["a2"], rho.dim - 2 * counts["e"]
        half = (first_e - first_b) // 2
        angle = torch.as_tensor(angle, dtype=torch.float64).expand(len(z)).view(-1, 1, 1, 1)
        moved = z.clone()
        for i in range(half):
            a, b = first_b + i, first_b + half + i
            u = torch.complex(z[:, [a]], z[:, [b]]) * torch.exp(1j * b_charge * scale * angle)
            moved[:, [a]], moved[:, [b]] = u.real, u.imag
        for x in range(first_e, rho.dim, 2):
            u = torch.complex(z[:, [x + 1]], -z[:, [x]]) * torch.exp(1j * e_charge * scale * angle)
            moved[:, [x + 1]], moved[:, [x]] = u.real, -u.imag
        return moved

    return act


@every_representation
def test_channels_are_complex_fields_of_charges_zero_one_and_two(rho):
    z, theta = draw(64, rho.dim, 1, 1), draw_angles(64)
    torch.testing.assert_close(
        act_by_angle(rho, theta, z), act_by_complex_numbers()(rho, theta, z), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "wrong",
    [{"b_charge": 1}, {"b_charge": 0}, {"e_charge": 2}, {"e_charge": -1}, {"scale": 1.5}],
    ids=str,
)
def test_a_wrong_charge_breaks_the_laws(wrong):
    """The control: the very same laws hold for the right charges and not for these."""
    rho = REPRESENTATIONS[0]
    assert_laws_on_channels(act_by_complex_numbers(), rho, 1e-12)
    with pytest.raises(AssertionError):
        assert_laws_on_channels(act_by_complex_numbers(**wrong), rho, 1e-2)


def test_b1_and_b2_turn_as_the_quadrupole_of_e():
    """The sign of charge 2: (x^2 - y^2, 2 x y) of a turned vector (x, y)."""
    vector, theta = draw(64, 2, 1, 1), draw_angles(64)

    def quadrupole(v):
        x, y = v[:, :1], v[:, 1:]
        return torch.cat([x**2 - y**2, 2 * x * y], 1)

    turned = act_by_angle(Representation(D4, e=1), theta, vector)
    pair = Representation(D4, b1=1, b2=1)
    torch.testing.assert_close(
        act_by_angle(pair, theta, quadrupole(vector)), quadrupole(turned), rtol=0, atol=1e-12
    )
    for g in D4:
        moved = (irrep_matrix("e", g) @ vector[..., 0])[..., None]
        torch.testing.assert_close(pair.act(g, quadrupole(vector)), quadrupole(moved))


@every_representation
@pytest.mark.parametrize("side", [2, 4, 5, 8])
def test_grids_agree_with_the_group_at_quarter_turns(rho, side):
    z = draw(4, rho.dim, side, side).float()
    turns = torch.arange(4) * math.pi / 2
    torch.testing.assert_close(act_by_angle(rho, turns, z), rho.act(TURNS, z), rtol=0, atol=1e-5)


def test_mirrors_invert_rotations_of_grids():
    rho = REPRESENTATIONS[0]
    z, theta = draw(4, rho.dim, 6, 6), draw_angles(4)
    for g in D4:
        sign = -1 if g.mirrored else 1
        conjugated = rho.act(g, act_by_angle(rho, theta, rho.act(g.inverse, z)))
        torch.testing.assert_close(
            conjugated, act_by_angle(rho, sign * theta, z), rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("side", [1, 2, 7, 32, 64])
def test_images_turn_exactly_by_quarter_turns(side):
    x = draw(2, 3, side, side).float()
    for k in range(-4, 5):
        expected = torch.rot90(x, k, (-2, -1))
        torch.testing.assert_close(rotate_image(x, k * math.pi / 2), expected, rtol=0, atol=2e-5)


def turn_plainly(image, angle, mode):
    """The usual way, as a yardstick: `grid_sample` without any filter."""
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = torch.tensor([[cosine, -sine, 0], [sine, cosine, 0]], dtype=image.dtype)
    points = F.affine_grid(matrix.expand(len(image), 2, 3), list(image.shape), align_corners=False)
    return F.grid_sample(image, points, mode, padding_mode="reflection", align_corners=False)


def draw_waves(highest):
    """Sums of plane waves below a share of the Nyquist frequency: (angle) -> 32 x 32 images."""
    count, waves, side = 32, 12, 32
    radius = 0.5 * highest * draw(count, waves, 1, 1).abs().clamp(max=1)
    direction, phase = (2 * math.pi * draw(count, waves, 1, 1) for _ in range(2))
    x = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    y = -x[:, None]

    def at(angle):
        fx, fy = radius * torch.cos(direction + angle), radius * torch.sin(direction + angle)
        return torch.cos(2 * math.pi * (fx * x + fy * y) + phase).mean(1, keepdim=True)

    return at


@pytest.mark.parametrize(("highest", "decibels"), [(0.3, 50), (0.6, 43)])
@pytest.mark.parametrize("degrees", [10, 45, 77, -30, 130])
def test_band_limited_images_turn_as_the_plane_does(highest, decibels, degrees):
    waves, disk, angle = draw_waves(highest), disk_mask(32, 32), math.radians(degrees)
    true = waves(angle)

    def score(x):
        return float(masked_psnr(x, true, disk).mean())

    assert score(rotate_image(waves(0.0), angle)) > decibels
    assert score(rotate_image(waves(0.0), -angle)) < 25
    bilinear = score(turn_plainly(waves(0.0), angle, "bilinear"))
    assert 25 < bilinear < score(rotate_image(waves(0.0), angle)) - 5


def test_rotations_of_images_compose_inside_the_disk():
    waves, disk = draw_waves(0.5)(0.0), disk_mask(32, 32)
    for first, second in draw_angles(10).view(5, 2).tolist():
        twice = rotate_image(rotate_image(waves, first), second)
        once = rotate_image(waves, first + second)
        assert float(masked_psnr(twice, once, disk).mean()) > 40
        back = rotate_image(rotate_image(waves, first), -first)
        assert float(masked_psnr(back, waves, disk).mean()) > 40


def test_what_would_alias_is_left_out():
    """A checkerboard turned by 45 degrees would pass the Nyquist frequency of its sides."""
    signs = (-1.0) ** torch.arange(32)
    checkerboard, disk = (signs[:, None] * signs).view(1, 1, 32, 32), disk_mask(32, 32)

    def energy(image):
        return float((disk * image.square()).sum() / disk.sum())

    assert energy(rotate_image(checkerboard, math.pi / 4)) < 0.03
    assert energy(turn_plainly(checkerboard, math.pi / 4, "bicubic")) > 0.2
    turned = rotate_image(checkerboard, math.pi / 2)
    torch.testing.assert_close(turned, -checkerboard, rtol=0, atol=1e-4)


def test_every_example_has_its_own_angle():
    rho = REPRESENTATIONS[0]
    x, z, theta = draw(5, 3, 16, 16), draw(5, rho.dim, 4, 4), draw_angles(5)
    for i, angle in enumerate(theta.tolist()):
        torch.testing.assert_close(rotate_image(x, theta)[[i]], rotate_image(x[[i]], angle))
        torch.testing.assert_close(
            act_by_angle(rho, theta, z)[[i]], act_by_angle(rho, angle, z[[i]])
        )


def test_gradients_reach_image_and_latent():
    rho = Representation(D4, a1=1, b1=1, b2=1, e=1)
    z = draw(2, rho.dim, 3, 3).requires_grad_()
    theta = torch.tensor([0.3, -1.2], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: act_by_angle(rho, theta, z), [z])


def test_inputs_are_not_modified():
    rho = REPRESENTATIONS[0]
    z = draw(2, rho.dim, 4, 4)
    before = z.clone()
    act_by_angle(rho, 0.0, z).add_(1)
    act_by_angle(rho, 0.7, z).add_(1)
    assert torch.equal(z, before)


def test_resampling_is_in_float32_under_autocast():
    rho = REPRESENTATIONS[0]
    x, z = draw(2, 3, 16, 16).float(), draw(2, rho.dim, 4, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, latent = rotate_image(x, 0.4), act_by_angle(rho, 0.4, z)
    assert torch.equal(image, rotate_image(x, 0.4))
    assert torch.equal(latent, act_by_angle(rho, 0.4, z))
    half = rotate_image(x.bfloat16(), 0.4)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotate_image(x.bfloat16().float(), 0.4).bfloat16())


@pytest.mark.parametrize(
    ("rho", "message"),
    [
        (Representation(D4, a1=1, b1=2, b2=1), r"b1=2 and b2=1 do not pair.*as many B1 as B2"),
        (Representation(D4, a1=1, b2=2), r"b1=0 and b2=2 do not pair.*as many B1 as B2"),
        (Representation(C4, a1=1, b1=3), r"b1=3 and b2=0 do not pair.*even number"),
        (Representation(C4, a1=1, b1=2, b2=1), r"b1=2 and b2=1 do not pair.*even number"),
        (Representation(FLIPS, a1=2), "group flips has no quarter turns; use D4 or C4"),
        (Representation(GROUPS["mirror"], a1=2), "group mirror has no quarter turns"),
        (Representation(GROUPS["trivial"], a1=2), "group trivial has no quarter turns"),
    ],
    ids=str,
)
def test_what_does_not_extend_is_refused(rho, message):
    with pytest.raises(ValueError, match=message):
        check_turns_by_any_angle(rho)
    with pytest.raises(ValueError, match=message):
        act_by_angle(rho, 0.1, draw(1, rho.dim, 2, 2))


def test_wrong_shapes_are_refused():
    rho = REPRESENTATIONS[0]
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\): expected \(batch, 13, h, w\)"):
        act_by_angle(rho, 0.1, draw(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\(1, 13, 2, 4\): only a square"):
        act_by_angle(rho, 0.1, draw(1, 13, 2, 4))
    with pytest.raises(ValueError, match="only a square"):
        rotate_image(draw(1, 3, 8, 6), 0.1)
    with pytest.raises(ValueError, match=r"angles of shape \(3,\) for 2 examples"):
        rotate_image(draw(2, 3, 8, 8), torch.zeros(3))


@pytest.mark.parametrize("edge", [0.0, 2.0])
@pytest.mark.parametrize("side", [1, 2, 7, 32])
def test_the_disk_has_all_eight_symmetries(side, edge):
    mask = disk_mask(side, side, edge)
    for g in D4:
        assert torch.equal(g.act_on_image(mask), mask)
    wide = disk_mask(side, 2 * side, edge)
    for g in FLIPS:
        assert torch.equal(g.act_on_image(wide), wide)
    assert mask.min() >= 0
    assert mask.max() <= 1


def test_the_disk_is_inscribed():
    mask = disk_mask(64, 64)
    assert float(mask.mean()) == pytest.approx(math.pi / 4, abs=0.01)
    assert mask[32, 0] == mask[32, 32] == 1
    assert mask[0, 0] == mask[4, 4] == 0
    soft = disk_mask(64, 64, 4.0)
    assert torch.all(soft <= mask)
    assert soft[32, 32] == 1
    assert 0 < soft[32, 1] < 1
    assert disk_mask(1, 1).tolist() == [[1.0]]
    assert disk_mask(2, 2).tolist() == [[1.0, 1.0], [1.0, 1.0]]
