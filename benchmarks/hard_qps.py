"""Convex quadratic programs of the Maros–Mészáros kind, drawn from seeds, and the certificate for answers to them.

The collection itself (Maros & Mészáros 1999, "A repository of convex quadratic programming problems", Optim. Methods
Softw. 11) is made of files that this project does not ship. "MM-like" is 14 families written after the descriptions
of its members, with n up to 300, and six of its members that fit on a line (Hock & Schittkowski 1981), whose optimal
values are known. What makes that collection hard is there on purpose: Q singular or zero, rows that repeat or depend,
no interior, vertices where more rows meet than there are unknowns, multipliers that vanish with their slacks, free
and fixed unknowns, empty rows, bounds of 1e8, coefficients over twelve orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
INF = np.inf


class Problem(NamedTuple):
    """min ½ zᵀQz + pᵀz subject to Az = b, Gz ≤ h, lb ≤ z ≤ ub, float64, entries of lb and ub may be infinite."""

    name: str
    Q: Array
    p: Array
    A: Array
    b: Array
    G: Array
    h: Array
    lb: Array
    ub: Array
    value: float | None = None  # the optimal value, where it is known beforehand


def problem(name: str, Q: Array, p: Array, **parts: Array | float | None) -> Problem:
    """A problem with the missing parts filled in."""
    n = len(p)
    empty = {"A": np.zeros((0, n)), "b": np.zeros(0), "G": np.zeros((0, n)), "h": np.zeros(0)}
    wide = {"lb": np.full(n, -INF), "ub": np.full(n, INF)}
    given = {**empty, **wide, **{key: part for key, part in parts.items() if part is not None}}
    value = given.pop("value", None)
    return Problem(name, np.asarray(Q, float), np.asarray(p, float), **given, value=value)


# --- members of the collection that fit on a line ---------------------------------------------------------------------


def hock_schittkowski(rng: np.random.Generator, k: int) -> Problem:
    """HS21, 35, 51, 52, 53, 76, k from 0 to 5, with the constant of the objective left out of `value`."""

    def squares(rows: list[list[float]], right: list[float]) -> tuple[Array, Array]:
        M, r = np.array(rows, float), np.array(right, float)
        return 2 * M.T @ M, -2 * M.T @ r

    one, middle = [[1.0, -1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]], [0.0, 2, 1, 1]
    A = np.array([[1.0, 3, 0, 0, 0], [0, 0, 1, 1, -2], [0, 1, 0, 0, -1]])
    if k == 0:
        G, h = np.array([[-10.0, 1]]), np.array([-10.0])
        return problem(
            "HS21", np.diag([0.02, 2]), np.zeros(2), G=G, h=h, lb=np.array([2.0, -50]), ub=np.full(2, 50.0), value=0.04
        )
    if k == 1:
        Q = np.array([[4.0, 2, 2], [2, 4, 0], [2, 0, 2]])
        G, h = np.array([[1.0, 1, 2]]), np.array([3.0])
        return problem("HS35", Q, np.array([-8.0, -6, -4]), G=G, h=h, lb=np.zeros(3), value=1 / 9 - 9)
    if k == 2:
        return problem("HS51", *squares(one, middle), A=A, b=np.array([4.0, 0, 0]), value=-6.0)
    if k == 3:
        steep = [[4.0, -1, 0, 0, 0], *one[1:]]
        return problem("HS52", *squares(steep, middle), A=A, b=np.zeros(3), value=1859 / 349 - 6)
    if k == 4:
        box = {"lb": np.full(5, -10.0), "ub": np.full(5, 10.0)}
        return problem("HS53", *squares(one, middle), A=A, b=np.zeros(3), **box, value=176 / 43 - 6)
    Q = np.array([[2.0, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 2, 1], [0, 0, 1, 1]])
    G = np.array([[1.0, 2, 1, 1], [3, 1, 2, -1], [0, -1, -4, 0]])
    p, h = np.array([-1.0, -3, 1, -1]), np.array([5.0, 4, -1.5])
    return problem("HS76", Q, p, G=G, h=h, lb=np.zeros(4), value=-103 / 22)


# --- families ---------------------------------------------------------------------------------------------------------


def cvxqp(rng: np.random.Generator, k: int) -> Problem:
    """CVXQP1–3: Q a sum of i·a aᵀ with three ones in a, rows of three entries, box, for few or many equalities."""
    n, share = (50, 100, 200)[k % 3], (0.5, 0.25, 0.75)[k // 2 % 3]
    i = np.arange(1, n + 1)
    a = np.zeros((n, n))
    for step, shift in ((1, 0), (2, -1), (3, -1)):
        np.add.at(a, (i - 1, (step * i + shift) % n), 1.0)
    Q = (a.T * i) @ a
    m = int(share * n)
    A = np.zeros((m, n))
    for weight, step in ((1.0, 1), (2.0, 4), (3.0, 5)):
        np.add.at(A, (i[:m] - 1, (step * i[:m] - 1) % n), weight)
    z0 = rng.choice([0.1, 0.5, 2.0], n)
    return problem("cvxqp", Q, np.zeros(n), A=A, b=A @ z0, lb=np.full(n, 0.1), ub=np.full(n, 10.0))


def liswet(rng: np.random.Generator, k: int) -> Problem:
    """LISWET1–12: the nearest sequence whose differences of order 2 to 4 have one sign; long chains of active rows."""
    n, order = (100, 150, 200)[k % 3], 2 + k % 3
    t = np.arange(n + order) / (n + order)
    target = np.sqrt(t) if k % 2 else 1.0 - np.exp(-3 * t) + t**2
    target = target + 0.1 * np.sin(np.arange(n + order)) + 0.02 * rng.standard_normal(n + order)
    G = np.diff(np.eye(n + order), n=order, axis=0) * (1.0 if k % 2 else -1.0)
    return problem("liswet", np.eye(n + order), -target, G=G, h=np.zeros(n))


def grid_flow(rng: np.random.Generator, k: int) -> Problem:
    """AUG2D and AUG2DQP: flows on a grid, conservation at every node (one row too many), some edges without cost."""
    side = (6, 8, 11)[k % 3]
    nodes = np.arange(side * side).reshape(side, side)
    edges = [*zip(nodes[:, :-1].ravel(), nodes[:, 1:].ravel()), *zip(nodes[:-1].ravel(), nodes[1:].ravel())]  # noqa: B905
    A = np.zeros((side * side, len(edges)))
    for e, (i, j) in enumerate(edges):
        A[i, e], A[j, e] = -1.0, 1.0
    flow = rng.uniform(0, 2, len(edges)) * (rng.random(len(edges)) < 0.7)
    weight = (rng.random(len(edges)) < 0.8).astype(float)
    lb = np.zeros(len(edges)) if k % 2 else None
    p = rng.uniform(0, 1, len(edges)) * (1 - weight) if k % 2 else np.zeros(len(edges))
    if not k % 2:
        weight[:] = 1.0
    return problem("grid flow", np.diag(weight), p, A=A, b=A @ flow, lb=lb)


def dual(rng: np.random.Generator, k: int) -> Problem:
    """DUAL1–4: a dense Q of low rank on the simplex with a box."""
    n, rank = (75, 85, 96)[k % 3], (10, 40, 3)[k % 3]
    F = rng.standard_normal((rank, n)) * 10.0 ** rng.uniform(-1, 1, (rank, 1))
    p = rng.uniform(-1, 0, n) if k % 2 else np.zeros(n)
    return problem("dual", F.T @ F, p, A=np.ones((1, n)), b=np.ones(1), lb=np.zeros(n), ub=np.full(n, 0.5))


def primal(rng: np.random.Generator, k: int) -> Problem:
    """PRIMAL1–4: Q the identity but for one unknown without cost of its own, in every one of many dense rows."""
    n, m = (100, 150, 60)[k % 3], (85, 75, 150)[k % 3]
    Q = np.diag(np.r_[np.ones(n), 0.0])
    G = np.c_[rng.standard_normal((m, n)) * (rng.random((m, n)) < 0.3), np.ones(m)]
    return problem("primal", Q, np.r_[np.zeros(n), -1.0], G=G, h=rng.uniform(0, 1, m))


def factor_portfolio(rng: np.random.Generator, k: int) -> Problem:
    """Portfolio with k factors as extra unknowns: free ones, Q diagonal and zero for a tenth of the assets."""
    n, factors = (100, 200, 270)[k % 3], (5, 15, 30)[k % 3]
    F = rng.standard_normal((n, factors)) * (rng.random((n, factors)) < 0.5)
    risk = rng.uniform(0, 0.3, n) * (rng.random(n) > 0.1)
    A = np.block([[np.ones((1, n)), np.zeros((1, factors))], [F.T, -np.eye(factors)]])
    p = np.r_[-0.1 * rng.standard_normal(n), np.zeros(factors)]
    lb, ub = np.r_[np.zeros(n), np.full(factors, -INF)], np.r_[np.full(n, 0.1), np.full(factors, INF)]
    return problem("portfolio", np.diag(np.r_[risk, np.ones(factors)]), p, A=A, b=np.eye(1 + factors)[0], lb=lb, ub=ub)


def _staircase(rng: np.random.Generator, n: int, n_eq: int, n_ineq: int, quadratic: int, spread: float) -> Problem:
    """Sparse rows in a staircase, drawn back from a degenerate optimum: a third of the pairs has both members zero."""

    def rows(m: int) -> Array:
        M = np.zeros((m, n))
        for i in range(m):
            width = int(rng.integers(2, 7))
            start = i * (n - 10) // max(m, 1)
            at = start + rng.choice(10, width, replace=False)
            M[i, at] = rng.choice([-1.0, 1.0], width) * 10.0 ** rng.uniform(-spread, spread, width)
        return M

    def pair(m: int) -> tuple[Array, Array]:
        side, size = rng.integers(0, 3, m), 0.1 + rng.exponential(1.0, m)
        return np.where(side == 0, size, 0.0), np.where(side == 1, size, 0.0)

    A, G = rows(n_eq), rows(n_ineq)
    z, reduced = pair(n)
    s, lam = pair(n_ineq)
    Q = np.zeros((n, n))
    at = rng.choice(n, quadratic, replace=False)
    F = rng.standard_normal((max(quadratic // 2, 1), quadratic))
    Q[np.ix_(at, at)] = F.T @ F if quadratic else 0.0
    p = -Q @ z - A.T @ rng.standard_normal(n_eq) - G.T @ lam + reduced
    value = float(0.5 * z @ Q @ z + p @ z)
    return problem("", Q, p, A=A, b=A @ z, G=G, h=G @ z + s, lb=np.zeros(n), value=value)


def netlib_quadratic(rng: np.random.Generator, k: int) -> Problem:
    """QAFIRO, QADLITTL, QSHARE: a linear program of netlib with a few unknowns in Q; coefficients from 1e-2 to 1e2."""
    n = (32, 97, 225)[k % 3]
    return _staircase(rng, n, n // 4, n // 3, n // 10, 2.0)._replace(name="netlib QP")


def netlib_linear(rng: np.random.Generator, k: int) -> Problem:
    """The same with Q = 0, and each third equality twice."""
    n = (32, 97, 225)[k % 3]
    drawn = _staircase(rng, n, n // 4, n // 3, 0, 1.0)
    A, b = np.r_[drawn.A, drawn.A[::3]], np.r_[drawn.b, drawn.b[::3]]
    return drawn._replace(name="netlib LP", A=A, b=b)


def badly_scaled(rng: np.random.Generator, k: int) -> Problem:
    """A netlib QP whose rows and unknowns are given in other units, each over 1e-6 to 1e6 (QFORPLAN, QPILOTNO)."""
    n, reach = (32, 97, 150)[k % 3], (3.0, 4.5, 6.0)[k % 3]
    drawn = _staircase(rng, n, n // 4, n // 3, n // 8, 1.0)
    d = 10.0 ** rng.uniform(-reach, reach, n)
    e, g = 10.0 ** rng.uniform(-reach, reach, len(drawn.b)), 10.0 ** rng.uniform(-reach, reach, len(drawn.h))
    return drawn._replace(
        name="badly scaled",
        Q=d[:, None] * drawn.Q * d,
        p=d * drawn.p,
        A=e[:, None] * drawn.A * d,
        b=e * drawn.b,
        G=g[:, None] * drawn.G * d,
        h=g * drawn.h,
    )


def transport(rng: np.random.Generator, k: int) -> Problem:
    """A transportation problem: linear, one dependent row, degenerate since partial sums of supply and demand agree."""
    rows, columns = ((6, 8), (10, 10), (12, 20))[k % 3]
    A = np.r_[np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))]
    plan = np.zeros((rows, columns))
    plan[rng.integers(0, rows, columns), np.arange(columns)] = rng.integers(1, 4, columns)
    cost = rng.integers(1, 9, rows * columns).astype(float)
    Q = np.zeros((rows * columns,) * 2)
    return problem("transport", Q, cost, A=A, b=A @ plan.ravel(), lb=np.zeros(rows * columns))


def control(rng: np.random.Generator, k: int) -> Problem:
    """Optimal control (LASER, CONT): states tied by dynamics, singular cost, inputs in a box, a bound on one state."""
    steps, states, inputs = (12, 20, 30)[k % 3], 6, 3
    dynamics = np.linalg.qr(rng.standard_normal((states, states)))[0] * 1.02
    entry = rng.standard_normal((states, inputs))
    n, m = steps * (states + inputs), steps * states
    A, b = np.zeros((m, n)), np.zeros(m)
    for t in range(steps):
        here, row = t * (states + inputs), slice(t * states, (t + 1) * states)
        A[row, here : here + inputs] = -entry
        A[row, here + inputs : here + inputs + states] = np.eye(states)
        if t:
            A[row, here - states : here] = -dynamics
    b[:states] = dynamics @ (3 * rng.standard_normal(states))
    cost = np.r_[np.zeros(inputs), np.r_[np.ones(2), np.zeros(states - 2)]]
    lb = np.tile(np.r_[np.full(inputs, -0.5), np.full(states, -INF)], steps)
    return problem("control", np.diag(np.tile(cost, steps)), np.zeros(n), A=A, b=b, lb=lb, ub=-lb)


def huestis(rng: np.random.Generator, k: int) -> Problem:
    """HUESTIS and HUES-MOD: two dense rows with large coefficients and right-hand sides, x ≥ 0, a scaled diagonal Q."""
    n, size = (50, 100, 300)[k % 3], (1e1, 1e2, 1e3)[k % 3]
    A = size * np.c_[rng.uniform(0.5, 1, n), np.linspace(0.01, 2, n)].T
    z0 = rng.exponential(1.0, n) * (rng.random(n) < 0.3) * size
    return problem("huestis", np.diag(10.0 ** rng.uniform(-4, 0, n)), np.zeros(n), A=A, b=A @ z0, lb=np.zeros(n))


def odd_ends(rng: np.random.Generator, k: int) -> Problem:
    """Free and fixed unknowns, bounds of ±1e8, empty rows, rows that repeat others, an equality that sums others."""
    n = (40, 80, 160)[k % 3]
    F = rng.standard_normal((n // 2, n))
    A = rng.standard_normal((n // 5, n)) * (rng.random((n // 5, n)) < 0.2)
    z0 = rng.standard_normal(n)
    A = np.r_[A, A[:3].sum(0, keepdims=True), np.zeros((1, n))]
    G = rng.standard_normal((n // 4, n))
    s = rng.exponential(1.0, len(G)) * (rng.random(len(G)) < 0.5)
    G, s = np.r_[G, 2 * G[:5], np.zeros((1, n))], np.r_[s, 2 * s[:5], 0.0]
    kind = rng.integers(0, 4, n)
    lb = np.choose(kind, [np.full(n, -INF), z0, np.full(n, -1e8), np.minimum(z0, 0)])
    ub = np.choose(kind, [np.full(n, INF), z0, np.full(n, 1e8), np.maximum(z0, 0)])
    p = F.T @ rng.standard_normal(n // 2)  # in the range of Q, so that the free unknowns cannot run away
    return problem("odd ends", F.T @ F, p, A=A, b=A @ z0, G=G, h=G @ z0 + s, lb=lb, ub=ub)


def semi_infinite(rng: np.random.Generator, k: int) -> Problem:
    """KSIP: few unknowns, hundreds of rows that are nearly parallel, so that many are active at once."""
    n, m = (10, 20, 20)[k % 3], (200, 300, 400)[k % 3]
    t = np.linspace(0, 1, m)
    G = -(t[:, None] ** np.arange(n))
    return problem("semi-infinite", np.eye(n), 1.0 / np.arange(1, n + 1), G=G, h=-np.tan(t) - 0.01 * rng.random(m))


FAMILIES: tuple[Callable[[np.random.Generator, int], Problem], ...] = (
    cvxqp, liswet, grid_flow, dual, primal, factor_portfolio, netlib_quadratic, netlib_linear, badly_scaled, transport,
    control, huestis, odd_ends, semi_infinite,
)  # fmt: skip


def problems(each: int = 6, seed: int = 0) -> Iterator[Problem]:
    """The set: the six members, then `each` of every family, names numbered; the same for the same seed."""
    for k in range(min(6, max(each, 2))):
        yield hock_schittkowski(np.random.default_rng(0), k)
    for f, family in enumerate(FAMILIES):
        for k in range(each):
            drawn = family(np.random.default_rng([seed, f, k]), k)
            yield drawn._replace(name=f"{drawn.name} {k + 1}")


# --- the certificate --------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """A point with its multipliers: Qz + p + Aᵀnu + Gᵀlam + bound = 0, lam ≥ 0, bound = lam_ub − lam_lb."""

    z: Array
    nu: Array
    lam: Array
    bound: Array


def residual(data: Problem, answer: Answer) -> float:
    r"""How far an answer is from the KKT conditions, whatever the units of the rows, of the unknowns and of the cost.

    The data are first brought to other units, rows and columns of [Q Aᵀ Gᵀ; A; G] to a largest entry of about one.
    There every row is judged by itself: |aᵢz − bᵢ| over the largest of its terms, |gᵢz − hᵢ|₊ and |lb − z|₊ likewise,
    each component of the stationarity over its largest term. A thousandth of the largest unknown (multiplier term) is
    added below, so that a row of zeros is not held to nothing. Signs of the multipliers count relative to the largest
    one, and the complementarity is Σ|λᵢsᵢ| over the terms of the objective (before they cancel). The largest of all is
    returned.
    """
    if not all(np.isfinite(part).all() for part in answer):
        return INF
    Q, A, G, d, e = _equilibrated(data)
    z = answer.z / d
    dual_eq, dual_in = (np.r_[answer.nu, answer.lam] / e)[: len(data.b)], (answer.lam / e[len(data.b) :])
    bound = answer.bound * d
    p, b, h = data.p * d, data.b * e[: len(data.b)], data.h * e[len(data.b) :]
    lb, ub = data.lb / d, data.ub / d
    floor = 1e-3 * np.abs(z).max()

    def relative(excess: Array, *terms: Array) -> float:
        scale = np.max([np.abs(term) for term in terms], axis=0) + floor if len(excess) else excess
        return float((np.abs(excess) / np.where(scale > 0, scale, 1.0)).max(initial=0.0))

    def over(left: Array, right: Array) -> Array:
        return np.where(np.isfinite(right), np.maximum(left - np.where(np.isfinite(right), right, 0.0), 0.0), 0.0)

    finite_lb, finite_ub = np.where(np.isfinite(lb), lb, 0.0), np.where(np.isfinite(ub), ub, 0.0)
    feasible = [
        relative(A @ z - b, np.abs(A) @ np.abs(z), b),
        relative(over(G @ z, h), np.abs(G) @ np.abs(z), h),
        relative(over(z, ub), z, finite_ub),
        relative(over(-z, -lb), z, finite_lb),
    ]
    terms = [np.abs(Q) @ np.abs(z), np.abs(p), np.abs(A.T) @ np.abs(dual_eq), np.abs(G.T) @ np.abs(dual_in)]
    size = np.max([*terms, np.abs(bound)], axis=0)
    gradient = Q @ z + p + A.T @ dual_eq + G.T @ dual_in + bound
    floor = 1e-3 * size.max()
    stationary = relative(gradient, size)
    upper, lower = np.maximum(bound, 0.0), np.maximum(-bound, 0.0)
    largest = max(np.abs(dual_in).max(initial=0.0), np.abs(bound).max(), size.max()) or 1.0
    signs = float(np.maximum(-dual_in, 0.0).max(initial=0.0)) / largest
    without = max(float(part.max(initial=0.0)) for part in (upper[~np.isfinite(ub)], lower[~np.isfinite(lb)])) / largest
    gap = np.abs(dual_in * (h - G @ z)).sum() + (upper * np.abs(finite_ub - z))[np.isfinite(ub)].sum()
    gap += (lower * np.abs(z - finite_lb))[np.isfinite(lb)].sum()
    objective = max(
        np.abs(z) @ np.abs(Q) @ np.abs(z) / 2,
        np.abs(p) @ np.abs(z),
        np.abs(b) @ np.abs(dual_eq),
        np.abs(h) @ np.abs(dual_in),
    )
    objective = max(objective, np.abs(finite_lb) @ lower, np.abs(finite_ub) @ upper)
    return max(*feasible, stationary, signs, without, float(gap / objective if objective > 0 else gap))


def _equilibrated(data: Problem) -> tuple[Array, Array, Array, Array, Array]:
    """Q, A, G with rows e and columns d scaled so that largest entries are about one (Ruiz 2001), and d, e."""
    n, E = len(data.p), np.r_[data.A, data.G]
    d, e = np.ones(n), np.ones(len(E))
    for _ in range(20):
        M, R = np.abs(d[:, None] * data.Q * d), np.abs(e[:, None] * E * d)
        columns = np.maximum(M.max(0, initial=0.0), R.max(0, initial=0.0))
        rows = R.max(1, initial=0.0)
        d /= np.sqrt(np.where(columns > 0, columns, 1.0))
        e /= np.sqrt(np.where(rows > 0, rows, 1.0))
    m = len(data.b)
    scaled = e[:, None] * E * d
    return d[:, None] * data.Q * d, scaled[:m], scaled[m:], d, e
