"""The group's laws, enumerated: eight elements deserve proof, not samples."""

import itertools

import pytest
import torch

from efae.symmetry import (
    D4,
    FLIPS,
    GROUPS,
    Representation,
    check_representation,
    group,
)
from efae.symmetry.group import act_on_grid, grid_sources
from efae.symmetry.representation import IRREPS

PAIRS = list(itertools.product(D4, D4))
REGULAR = Representation(D4, a1=1, a2=1, b1=1, b2=1, e=2)


def test_group_axioms():
    for a, b, c in itertools.product(D4, D4, D4):
        assert (a @ b) @ c == a @ (b @ c)
    for a in D4:
        assert a @ a.inverse == a.inverse @ a == D4.identity
        assert a @ D4.identity == D4.identity @ a == a
    assert len(D4) == len({g.name for g in D4}) == 8


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


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_image_action_is_a_left_action(a, b):
    x = torch.randn(1, 2, 5, 5)
    assert torch.equal((a @ b).act_on_image(x), a.act_on_image(b.act_on_image(x)))


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


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_latent_action_composes(a, b):
    z = torch.randn(2, REGULAR.dim, 3, 3)
    assert torch.equal(REGULAR.act(a, REGULAR.act(b, z)), REGULAR.act(a @ b, z))


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
    del matrices["rot90"]
    with pytest.raises(ValueError, match="no matrix for rot90"):
        check_representation(D4, matrices)


def test_non_square_grids_need_a_group_without_quarter_turns():
    with pytest.raises(ValueError, match="4 x 6 is not square"):
        grid_sources(D4, 4, 6)
    x = torch.randn(1, 2, 4, 6)
    for i, g in enumerate(FLIPS):
        assert torch.equal(act_on_grid(FLIPS, torch.tensor([i]), x), g.act_on_image(x))


def test_bad_requests_name_the_value():
    with pytest.raises(KeyError, match="rot45"):
        D4["rot45"]
    with pytest.raises(ValueError, match="expected \\(batch, 8"):
        REGULAR.act(D4.identity, torch.zeros(2, 7, 4, 4))
    with pytest.raises(ValueError, match=r"\(2,\) group elements for 3 examples"):
        REGULAR.act([D4.identity] * 2, torch.zeros(3, 8, 4, 4))
