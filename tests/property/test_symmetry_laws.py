"""The group's laws, enumerated: eight elements deserve proof, not samples."""

import copy
import itertools
import math
import pickle

import pytest
import torch

from efae.symmetry import (
    C4,
    D4,
    FLIPS,
    GROUPS,
    Representation,
    check_representation,
    group,
)
from efae.symmetry.group import act_on_grid, grid_sources
from efae.symmetry.representation import IRREPS, group_law_error, split_pixels

REGULAR = Representation(D4, a1=1, a2=1, b1=1, b2=1, e=2)


def test_group_axioms():
    for a, b, c in itertools.product(D4, D4, D4):
        assert (a @ b) @ c == a @ (b @ c)
    for a in D4:
        assert a @ a.inverse == a.inverse @ a == D4.identity
        assert a @ D4.identity == D4.identity @ a == a
    assert len(D4) == len({g.name for g in D4}) == 8


@pytest.mark.parametrize(
    "make_copy", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
)
def test_copies_and_pickles_have_the_same_group_and_tables_of_the_cpu(make_copy):
    assert all(make_copy(member) is member for member in GROUPS.values())
    own = group.Group("D4", C4.elements)
    assert make_copy(own).elements == own.elements
    assert make_copy(own) is not own
    rho, cpu = Representation(D4, a1=1, e=1), torch.device("cpu")
    rho.tables(torch.device("meta"))
    copied = make_copy(rho)
    assert copied.group is D4
    assert list(copied.__dict__["_tables"]) == [cpu]
    assert all(map(torch.equal, copied.tables(cpu), rho.tables(cpu)))


def test_subgroups_are_closed_and_named():
    assert {name: [g.name for g in GROUPS[name]] for name in GROUPS} == {
        "D4": [g.name for g in D4],
        "C4": ["identity", "rot90", "rot180", "rot270"],
        "flips": ["identity", "rot180", "flip_h", "flip_v"],
        "mirror": ["identity", "flip_h"],
        "trivial": ["identity"],
    }
    for subgroup in GROUPS.values():
        for a, b in itertools.product(subgroup, subgroup):
            assert a @ b in list(subgroup)


@pytest.mark.parametrize("name", GROUPS)
def test_splits_of_subgroups_name_distinct_irreps(name):
    """The irreps that a split deals out have different characters on the group."""
    subgroup = GROUPS[name]
    rotation_dims = 4 if subgroup.turns else 0
    split = 0.5 if len(subgroup) > 1 else 0.0
    rho = Representation.from_split(
        group=subgroup, dim=16, rotation_dims=rotation_dims, chirality_split=split
    )
    assert rho.dim == 16
    check_representation(subgroup, {g.name: rho.matrix(g) for g in subgroup}, tolerance=1e-12)
    used = [irrep for irrep, count in rho.multiplicities.items() if count]
    characters = {
        tuple(float(Representation(subgroup, **{irrep: 1}).matrix(g).trace()) for g in subgroup)
        for irrep in used
    }
    assert len(characters) == len(used)


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("mirror", {"rotation_dims": 4}, "rotation_dims=4: no element of mirror rotates"),
        ("trivial", {"chirality_split": 0.5}, "no element of trivial changes a sign"),
    ],
)
def test_splits_that_a_subgroup_cannot_have(name, knobs, message):
    given = {"dim": 16, "rotation_dims": 0, "chirality_split": 0.0} | knobs
    with pytest.raises(ValueError, match=message):
        Representation.from_split(group=GROUPS[name], **given)


def test_elements_are_torch_operations():
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    expected = {
        "identity": x,
        "rot90": torch.rot90(x, 1, (-2, -1)),
        "rot180": torch.rot90(x, 2, (-2, -1)),
        "rot270": torch.rot90(x, 3, (-2, -1)),
        "flip_h": x.flip(-1),
        "flip_v": x.flip(-2),
        "transpose": x.transpose(-2, -1),
        "anti_transpose": torch.rot90(x, 2, (-2, -1)).transpose(-2, -1),
    }
    for g in D4:
        assert torch.equal(g.act_on_image(x), expected[g.name])


def test_the_docstring_draws_the_elements():
    letter = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    rows = [line.split() for line in group.__doc__.splitlines()]
    figure = [row for row in rows if len(row) == 8 and set("".join(row)) == {"#", "."}]
    assert len(figure) == 4
    for i, g in enumerate(D4):
        drawn = [row[i] for row in figure]
        acted = g.act_on_image(letter)
        assert drawn == ["".join("#" if cell else "." for cell in row) for row in acted], g


def act_by_matrix(group, g, z):
    """rho(g) on channels alone, by the matrix."""
    matrix = all_irreps(group).matrix(g).to(z.dtype)
    return torch.einsum("ij,bjhw->bihw", matrix, z)


def act_on_cells(group, g, x):
    return act_on_grid(group, torch.full((len(x),), group.index(g)), x)


def all_irreps(group):
    return Representation(group, a1=1, a2=1, b1=1, b2=1, e=1)


# By name: the action, and the grid that it acts on.
ACTIONS = {
    "images": (lambda group, g, x: g.act_on_image(x), (5, 5)),
    "images, one element per example": (act_on_cells, (4, 4)),
    "rectangles, one element per example": (
        lambda group, g, x: act_on_grid(group, [g] * len(x), x),
        (2, 3),
    ),
    "channels, by matrix": (act_by_matrix, (1, 1)),
    "channels": (lambda group, g, z: all_irreps(group).act(g, z), (1, 1)),
    "latent grid": (lambda group, g, z: all_irreps(group).act(g, z), (3, 3)),
    "rectangular latent grid": (lambda group, g, z: all_irreps(group).act(g, z), (2, 3)),
    "rectangular latent grid, one element per example": (
        lambda group, g, z: all_irreps(group).act([g] * len(z), z),
        (3, 2),
    ),
}


def broken_products(group, act, sides):
    """The products, of two and of three elements and of none, that an action gets wrong."""
    height, width = sides
    x = 1.0 + torch.arange(6 * height * width).view(1, 6, height, width)  # no symmetry, exact sums
    once = {g: act(group, g, x) for g in group}
    twice = {(a, b): act(group, a, once[b]) for a, b in itertools.product(group, repeat=2)}
    broken = [
        pair for pair, found in twice.items() if not torch.equal(found, once[pair[0] @ pair[1]])
    ]
    for a, b, c in itertools.product(group, repeat=3):
        if not torch.equal(act(group, a, twice[b, c]), once[a @ b @ c]):
            broken.append((a, b, c))
    return broken if torch.equal(once[group.identity], x) else [(), *broken]


every_group = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)


@every_group
@pytest.mark.parametrize("name", ACTIONS)
def test_products_of_two_and_three_elements_act_as_they_multiply(group, name):
    act, sides = ACTIONS[name]
    assert broken_products(group, act, sides) == []


def mirror_last(group, g, x):
    """The mirror after the turn, not before it."""
    turned = torch.rot90(x, g.quarter_turns, (-2, -1))
    return turned.flip(-1) if g.mirrored else turned


def flip_signs_beside_planes(group, g, z):
    """The original sketch's action: a mirror leaves the planes alone that a turn rotates."""
    turned = act_by_matrix(group, D4[g.quarter_turns], z)
    sign = torch.tensor([1, -1, 1, -1, 1, 1])[:, None, None]
    return turned * sign if g.mirrored else turned


def lose_a_sign(group, g, z):
    acted = all_irreps(group).act(g, z)
    return acted.abs() if g == D4["rot180"] else acted


NOT_ACTIONS = {
    "mirror after the turn": mirror_last,
    "the inverse": lambda group, g, x: g.inverse.act_on_image(x),
    "cells sent where they come from": lambda group, g, x: x.flatten(2)[
        ..., grid_sources(group, *x.shape[-2:])[group.index(g)].argsort()
    ].view(x.shape),
    "the sketch": flip_signs_beside_planes,
    "a lost sign": lose_a_sign,
    "nothing kept": lambda group, g, x: torch.zeros_like(x),
}


@pytest.mark.parametrize("name", NOT_ACTIONS)
def test_the_check_of_products_refuses_what_is_no_action(name):
    broken = broken_products(D4, NOT_ACTIONS[name], (4, 4))
    if name == "nothing kept":
        assert broken == [()]  # every product holds, but the identity does not
    else:
        assert {len(product) for product in broken} == {2, 3}


def take_moments(image):
    """A steerable latent of 4 x 4 cells, by the definition of the irreps: moments of the pixels.

    About a cell's centre 1 is A1, (x, y) is E, x^2 - y^2 is B1, xy is B2, and their product A2.
    """
    x = torch.tensor([-3.0, -1.0, 1.0, 3.0]).expand(4, 4)
    y = -x.T  # rows run down
    b1, b2 = x.square() - y.square(), x * y
    basis = torch.stack([torch.ones(4, 4), b1 * b2, b1, b2, x, y])
    return torch.nn.functional.conv2d(image, basis[:, None], stride=4)


def wrong_elements(group, act):
    """The elements whose action on a latent is not what becomes of the latent of the image."""
    image = torch.randint(-9, 9, (2, 1, 16, 16), generator=torch.Generator().manual_seed(0)).float()
    moments = take_moments(image)
    return [
        g
        for g in group
        if not torch.equal(act(group, g, moments), take_moments(g.act_on_image(image)))
    ]


@every_group
def test_latents_follow_their_images(group):
    assert wrong_elements(group, lambda group, g, z: all_irreps(group).act(g, z)) == []


def with_channels(order):
    """The action with two of its channels, or irreps, taken for each other."""
    return lambda group, g, z: all_irreps(group).act(g, z[:, order])[:, order]


# The group does act in each of these ways, but none is what happens to the latent of an image.
ELSEWHERE = {
    "channels only": act_by_matrix,
    "cells only": act_on_cells,
    "the other axis is mirrored": with_channels([0, 1, 2, 3, 5, 4]),
    "B1 for B2": with_channels([0, 1, 3, 2, 4, 5]),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_check_of_latents_refuses_actions_that_are_not_theirs(name):
    assert broken_products(D4, ELSEWHERE[name], (4, 4)) == []
    assert wrong_elements(D4, ELSEWHERE[name])


def test_image_action_is_out_of_place():
    x = torch.randn(1, 1, 4, 4)
    for g in D4:
        before = x.clone()
        g.act_on_image(x).add_(1)
        assert torch.equal(x, before)


@pytest.mark.parametrize("irrep", IRREPS)
def test_irreps_are_representations(irrep):
    rho = Representation(D4, **{irrep: 1})
    check_representation(D4, {g.name: rho.matrix(g) for g in D4}, tolerance=1e-12)
    for g in D4:
        assert torch.equal(rho.matrix(g) @ rho.matrix(g).T, torch.eye(rho.dim, dtype=torch.float64))


def test_latent_action_is_matrix_and_grid():
    z = torch.randn(2, REGULAR.dim, 4, 4)
    for g in D4:
        expected = torch.einsum("ij,bjhw->bihw", REGULAR.matrix(g).float(), g.act_on_image(z))
        assert torch.equal(REGULAR.act(g, z), expected)


def test_one_element_per_example():
    z, x = torch.randn(8, REGULAR.dim, 2, 2), torch.randn(8, 3, 6, 6)
    chosen = torch.arange(8)
    for acted in (REGULAR.act(list(D4), z), REGULAR.act(chosen, z)):
        for i, g in enumerate(D4):
            assert torch.equal(acted[i : i + 1], REGULAR.act(g, z[i : i + 1]))
    moved = act_on_grid(D4, chosen, x)
    for i, g in enumerate(D4):
        assert torch.equal(moved[i], g.act_on_image(x[i]))


def test_distinct_irreps_are_orthogonal_characters():
    for first, second in itertools.product(IRREPS, IRREPS):
        characters = [
            [Representation(D4, **{irrep: 1}).matrix(g).trace() for g in D4]
            for irrep in (first, second)
        ]
        inner = sum(x * y for x, y in zip(*characters, strict=True)) / 8
        assert inner == (1 if first == second else 0)


@pytest.mark.parametrize("dim", range(1, 20))
def test_split_gives_what_it_names(dim):
    for rotation_dims in range(0, dim + 1, 2):
        for share in (0.0, 0.25, 0.5, 1.0):
            rho = Representation.from_split(
                group=D4, dim=dim, rotation_dims=rotation_dims, chirality_split=share
            )
            m = rho.multiplicities
            assert rho.dim == dim
            assert m["e"] == rotation_dims // 2
            assert m["a2"] + m["b1"] + m["b2"] == round((dim - rotation_dims) * share)
            assert max(m["a2"], m["b1"], m["b2"]) - min(m["a2"], m["b1"], m["b2"]) <= 1


def test_measured_split_is_the_default_of_16():
    rho = Representation.from_split(group=D4, dim=16, rotation_dims=8, chirality_split=0.5)
    assert rho.multiplicities == {"a1": 4, "a2": 1, "b1": 2, "b2": 1, "e": 4}


@pytest.mark.parametrize("name", GROUPS)
def test_the_default_split_is_like_pixels_and_leaves_room_for_colours(name):
    group = GROUPS[name]
    for dim in range(1, 40):
        for colours in range(1, min(dim, 4) + 1):
            rho = Representation.from_split(group=group, dim=dim, invariant=colours)
            assert rho.dim == dim
            assert rho.multiplicities["a1"] >= colours
            check_representation(group, {g.name: rho.matrix(g) for g in group})
    rho = Representation.from_split(group=group, dim=32, invariant=3)
    faithful = {tuple(rho.matrix(g).flatten().tolist()) for g in group}
    assert len(faithful) == len(group)  # no two elements act alike


def test_the_default_split_of_d4():
    rho = Representation.from_split(group=D4, dim=32, invariant=3)
    assert rho.multiplicities == {"a1": 8, "a2": 2, "b1": 3, "b2": 3, "e": 8}
    tight = Representation.from_split(group=D4, dim=4, invariant=3)
    assert tight.multiplicities["a1"] == 3


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"rotation_dims": 3}, "rotation_dims=3.*even"),
        ({"rotation_dims": 18}, "rotation_dims=18.*dim=16"),
        ({"chirality_split": 1.5}, "chirality_split=1.5"),
    ],
)
def test_impossible_splits_are_refused(knobs, message):
    given = {"dim": 16, "rotation_dims": 8, "chirality_split": 0.5} | knobs
    with pytest.raises(ValueError, match=message):
        Representation.from_split(group=D4, **given)


def test_the_sketch_is_refused_with_the_reason():
    """Sign flips beside planes that a mirror leaves alone are no representation of D4."""
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    matrices = {
        g.name: torch.block_diag(
            torch.tensor([[(-1.0) ** g.mirrored]]), torch.matrix_power(quarter, g.quarter_turns)
        )
        for g in D4
    }
    with pytest.raises(ValueError, match=r"rho\(\w+ @ \w+\) differs.*by 2.*h r h = r\^-1"):
        check_representation(D4, matrices)
    zeros = {name: torch.zeros_like(matrix) for name, matrix in matrices.items()}
    with pytest.raises(ValueError, match=r"rho\(identity\) differs from the identity matrix by 1"):
        check_representation(D4, zeros)
    lost = {**matrices, "rot180": torch.full((3, 3), math.nan)}
    with pytest.raises(ValueError, match="the matrix of rot180 has NaN or infinity"):
        check_representation(D4, lost)
    assert math.isnan(group_law_error(D4, lost)[0])
    del matrices["rot90"]
    with pytest.raises(ValueError, match="no matrix for rot90"):
        check_representation(D4, matrices)


def test_quarter_turns_do_not_permute_the_cells_of_a_rectangle():
    with pytest.raises(ValueError, match="4 x 6 is not square"):
        grid_sources(D4, 4, 6)
    x = torch.randn(1, 2, 4, 6)
    for i, g in enumerate(FLIPS):
        assert torch.equal(act_on_grid(FLIPS, torch.tensor([i]), x), g.act_on_image(x))


@pytest.mark.parametrize("swapping", [False, True])
def test_one_element_per_example_of_a_rectangle(swapping):
    chosen = [g for g in D4 if g.swaps_sides == swapping]
    z, x = torch.randn(4, REGULAR.dim, 2, 5), torch.randn(4, 3, 4, 6)
    acted, moved = REGULAR.act(chosen, z), act_on_grid(D4, chosen, x)
    assert acted.shape[2:] == ((5, 2) if swapping else (2, 5))
    for i, g in enumerate(chosen):
        assert torch.equal(acted[i : i + 1], REGULAR.act(g, z[i : i + 1]))
        assert torch.equal(moved[i], g.act_on_image(x[i]))


def test_elements_that_cannot_act_on_a_rectangle_together():
    z = torch.randn(2, REGULAR.dim, 2, 3)
    with pytest.raises(ValueError, match=r"identity and rot90 .* 2 x 3: .* 3 x 2; act on two"):
        REGULAR.act([D4["identity"], D4["rot90"]], z)
    with pytest.raises(ValueError, match=r"positions in D4.* 2 x 3: .*one element, or a list"):
        REGULAR.act(torch.tensor([0, 2]), z)


def test_bad_requests_name_the_value():
    with pytest.raises(KeyError, match="rot45"):
        D4["rot45"]
    with pytest.raises(ValueError, match="rot90 is not in flips, which has identity, rot180"):
        Representation(FLIPS, a1=1).act(D4["rot90"], torch.zeros(1, 1, 2, 3))
    with pytest.raises(ValueError, match="expected \\(batch, 8"):
        REGULAR.act(D4.identity, torch.zeros(2, 7, 4, 4))
    with pytest.raises(ValueError, match=r"\(2,\) group elements for 3 examples"):
        REGULAR.act([D4.identity] * 2, torch.zeros(3, 8, 4, 4))


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_the_split_of_pixels_follows_from_their_characters(side):
    pixels = torch.arange(side * side).view(1, 1, side, side)
    copies = {
        irrep: sum(
            float(Representation(D4, **{irrep: 1}).matrix(g).trace())
            * int((g.act_on_image(pixels) == pixels).sum())
            for g in D4
        )
        / len(D4)
        for irrep in ("a2", "b1", "b2", "e")
    }
    changing = copies["a2"] + copies["b1"] + copies["b2"]
    assert split_pixels(side) == (2 * copies["e"] / side**2, changing / side**2)
