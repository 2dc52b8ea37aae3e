"""The learned basis keeps the group law wherever training takes it."""

import itertools

import pytest
import torch
from torch import nn

from efae.symmetry import D4, Representation
from efae.symmetry.learned_basis import Basis
from efae.symmetry.representation import group_law_error
from efae.training.ema import MovingAverage

RHO = Representation(D4, a1=3, a2=1, b1=2, b2=2, e=4)
MATRICES = torch.stack([RHO.matrix(g) for g in D4])
IDENTITY = torch.eye(RHO.dim, dtype=torch.float64)


def turned_representation(q):
    """Q rho(g) Q^T of all eight elements (element, dim, dim)."""
    return q @ MATRICES @ q.T


def law_errors(q):
    """(orthogonality, group law over all 64 pairs), the largest entry of each."""
    orthogonality = (q @ q.T - IDENTITY).abs().max()
    matrices = {g.name: m for g, m in zip(D4, turned_representation(q), strict=True)}
    return float(orthogonality), group_law_error(D4, matrices)[0]


class FreeMatrix(nn.Module):
    """The control: what learns in place of Q without a constraint."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim) + 0.02 * torch.randn(dim, dim))

    def matrix(self):
        return self.weight.double()


def train(module, steps=200, learning_rate=0.1):
    """Towards representation matrices in a far basis; returns the moving average of the weights."""
    generator = torch.Generator().manual_seed(1)
    target = torch.linalg.qr(torch.randn(IDENTITY.shape, generator=generator).double())[0]
    wanted = turned_representation(target)
    average = MovingAverage(module, decay=0.9)
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, fused=True)
    for step in range(steps):
        optimizer.zero_grad()
        q = module.matrix()
        error = turned_representation(q) - wanted
        error.square().sum((1, 2)).mean().backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
        optimizer.step()
        average.update(module, step)
    return average


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    basis = Basis(RHO.dim)
    before = basis.matrix().detach()
    average = train(basis)
    return before, basis, average


def test_the_law_holds_before_and_after_training_and_for_the_average(trained):
    before, basis, average = trained
    after = basis.matrix().detach()
    assert (after - before).norm() > 2  # the far side of the orthogonal group is 2 sqrt(dim) away
    averaged = Basis(RHO.dim)
    average.copy_to(averaged)
    smooth = averaged.matrix().detach()
    assert (smooth - after).norm() > 1e-3
    for q in (before, after, smooth):
        orthogonality, law = law_errors(q)
        assert orthogonality < 1e-12
        assert law < 1e-12


def test_an_average_of_orthogonal_matrices_breaks_the_law(trained):
    """Why the free parameter is averaged, and not Q."""
    before, basis, _ = trained
    assert min(law_errors((before + basis.matrix().detach()) / 2)) > 1e-2


def test_a_free_matrix_breaks_the_law():
    torch.manual_seed(0)
    free = FreeMatrix(RHO.dim)
    train(free)
    assert min(law_errors(free.matrix().detach())) > 1e-4


def test_the_latent_action_in_the_learned_basis_composes(trained):
    _, basis, _ = trained
    q = basis.matrix().detach()
    z = torch.randn(2, RHO.dim, 3, 3, generator=torch.Generator().manual_seed(2)).double()

    def act(g, z):
        return basis.from_irreps(RHO.act(g, basis.to_irreps(z, q)), q)

    for a, b in itertools.product(D4, D4):
        torch.testing.assert_close(act(a, act(b, z)), act(a @ b, z), rtol=0, atol=1e-12)
    matrix = turned_representation(q)[D4.index(D4["transpose"])]
    expected = D4["transpose"].act_on_image(torch.einsum("ij,bjhw->bihw", matrix, z))
    torch.testing.assert_close(act(D4["transpose"], z), expected, rtol=0, atol=1e-12)
    assert (act(D4["flip_h"], z) - RHO.act(D4["flip_h"], z)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_there_and_back_keeps_the_latent_and_its_type(dtype):
    torch.manual_seed(0)
    basis, z = Basis(8), torch.randn(2, 8, 4, 4).to(dtype)
    moved = basis.to_irreps(z)
    back = basis.from_irreps(moved, basis.matrix())
    assert moved.dtype == back.dtype == dtype
    assert (moved - z).abs().max() > 0.05
    torch.testing.assert_close(back, z, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_autocast_does_not_touch_the_law():
    torch.manual_seed(0)
    basis, z = Basis(8), torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, moved = basis.matrix(), basis.to_irreps(z)
    assert torch.equal(q, basis.matrix())
    assert torch.equal(moved, basis.to_irreps(z))


def test_autograd_is_right():
    torch.manual_seed(0)
    basis = Basis(4).double()
    z = torch.randn(1, 4, 2, 2, dtype=torch.float64)

    def forward(angles):
        return torch.func.functional_call(basis, {"angles": angles}, (z,))

    basis.forward = basis.to_irreps
    assert torch.autograd.gradcheck(forward, [basis.angles.detach().requires_grad_()])


def test_it_starts_near_the_identity_from_the_global_seed():
    torch.manual_seed(0)
    first, second = Basis(32), Basis(32)
    torch.manual_seed(0)
    assert torch.equal(first.angles, Basis(32).angles)
    assert not torch.equal(first.angles, second.angles)
    q = first.matrix().detach()
    assert 0.05 < float(torch.linalg.matrix_norm(q - torch.eye(32), ord=2)) < 0.5
    assert float(torch.linalg.det(q)) == pytest.approx(1)


def test_state_is_one_plain_tensor():
    assert {name: tuple(t.shape) for name, t in Basis(6).state_dict().items()} == {"angles": (15,)}


def test_one_channel_is_refused():
    with pytest.raises(ValueError, match="1 channels has nothing to learn"):
        Basis(1)


@pytest.mark.parametrize("dim", [2, 3, 4, 7, 16])
def test_the_angles_of_any_rotation_are_found(dim):
    generator = torch.Generator().manual_seed(dim)
    eye = torch.eye(dim, dtype=torch.float64)
    half_turn = torch.diag(torch.tensor([-1.0, -1.0] + [1.0] * (dim - 2))).double()
    random = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    signs = torch.randint(2, (dim,), generator=generator).double() * 2 - 1
    permutation = eye[torch.randperm(dim, generator=generator)] * signs
    basis = Basis(dim)
    for matrix in (eye, half_turn, random, random @ half_turn @ random.T, permutation):
        if torch.linalg.det(matrix) < 0:
            matrix = matrix * torch.tensor([-1.0] + [1.0] * (dim - 1)).double()
        basis.set_matrix(matrix)
        torch.testing.assert_close(basis.matrix(), matrix, atol=1e-6, rtol=0)
