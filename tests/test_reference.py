"""The independent answers are right by a third route, and refuse what they cannot verify."""

import cvxpy
import pytest
import torch

from implicit_layers.errors import ConvergenceError
from implicit_layers.reference import Program, exact_qp, program
from implicit_layers.testing import kkt_certificate


def random_program(seed: int, batch: int = 4, n: int = 8, n_ineq: int = 10, n_eq: int = 2) -> Program:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=g, dtype=torch.float64)

    L, G, A, z = normal(n, n), normal(n_ineq, n), normal(n_eq, n), normal(n)
    slack = torch.rand(batch, n_ineq, generator=g, dtype=torch.float64)
    h, b = (G @ z[..., None])[..., 0] + slack, (A @ z[..., None])[..., 0]
    return Program(L @ L.mT / n + 0.1 * torch.eye(n, dtype=torch.float64), normal(n), A, b, G, h)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("guess", [None, False, True])
def test_exact_qp_agrees_with_cvxpy_whatever_the_guess(seed, guess):
    data = random_program(seed)
    exact = exact_qp(data, None if guess is None else torch.full((4, 10), guess))
    Q, p, A, b, G, h = data
    assert float(kkt_certificate(Q, p, exact.z, exact.nu, exact.lam, A=A, b=b, G=G, h=h).max()) < 1e-12
    for i in range(4):
        Q, p, A, b, G, h = (argument[i].numpy() for argument in data)
        z = cvxpy.Variable(8)
        objective = cvxpy.Minimize(0.5 * cvxpy.quad_form(z, cvxpy.psd_wrap(Q)) + p @ z)
        cvxpy.Problem(objective, [A @ z == b, G @ z <= h]).solve(solver="CLARABEL")
        assert abs(z.value - exact.z[i].numpy()).max() < 1e-5


def test_exact_qp_gradient_is_that_of_finite_differences():
    data = Program(*(argument.requires_grad_() for argument in random_program(5, batch=1, n=4, n_ineq=3, n_eq=1)))
    guess = exact_qp(data).active
    assert torch.autograd.gradcheck(lambda *arguments: exact_qp(Program(*arguments), guess)[:3], tuple(data))


def test_infeasible_program_is_refused():
    eye = torch.eye(1, dtype=torch.float64)
    data = program(eye, torch.zeros(1), G=torch.tensor([[1.0], [-1.0]]), h=torch.tensor([-1.0, -1.0]))
    with pytest.raises(ConvergenceError, match="problem 0"):
        exact_qp(data, torch.tensor([[True, False]]))


def test_program_batches_what_is_shared_and_sums_its_gradient():
    Q = torch.eye(2, requires_grad=True)
    data = program(Q, torch.ones(3, 5, 2))
    assert data.Q.shape == (15, 2, 2) and data.G.shape == (15, 0, 2)
    assert data.b.shape == (15, 0) and data.p.dtype == torch.float64
    exact = exact_qp(data)
    exact.z.sum().backward()
    torch.testing.assert_close(Q.grad, torch.full((2, 2), 15.0))
    assert exact_qp(program(Q, torch.ones(0, 2))).z.shape == (0, 2)
