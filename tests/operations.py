"""The table of differentiable operations. A new one adds a row here and inherits every test of `test_contracts.py`.

A row draws its inputs in float64 on the CPU, for any batch shape; the tests move, cast, stride and share them. The
problems are small and their solutions well away from a kink, so that finite differences mean something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import implicit_layers as il

Batch = tuple[int, ...]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Operation:
    """One row.

    Attributes:
        name:        of the row; what stands before a colon is the public name.
        make:        (batch, seed) -> float64 inputs; those with `batched` have the leading dimensions `batch`.
        call:        inputs -> differentiable outputs, each with the leading dimensions of the batch.
        events:      trailing dimensions of each input, those of one problem.
        batched:     which inputs may have a batch; a module's parameters have none. Empty: all.
        module:      makes the module, for the operations that are one; its parameters are the first inputs, in order.
        fullgraph:   the compiler needs no break of the graph.
        fullgraph_vmap: the same under `vmap`; None: as `fullgraph`.
        fake_cuda:   it runs on CUDA tensors without values (`FakeTensorMode`): no value is read, and no slice is taken,
                     for which PyTorch wants a real device.
        syncs:       the most host synchronisations of a forward pass, further ones an iteration, of a backward pass.
        iterations:  inputs -> the iterations that each problem of the batch took; None: it does not iterate.
        exceptions:  promises that are not kept, each with the reason.
    """

    name: str
    make: Callable[[Batch, int], Tensors]
    call: Callable[..., Tensors]
    events: tuple[int, ...]
    batched: tuple[bool, ...] = ()
    module: Callable[[], torch.nn.Module] | None = None
    fullgraph: bool = False
    fullgraph_vmap: bool | None = None
    fake_cuda: bool = False
    syncs: tuple[int, int, int] = (0, 0, 0)
    iterations: Callable[..., Tensor] | None = None
    exceptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def public_name(self) -> str:
        return self.name.partition(":")[0]

    @property
    def breaks(self) -> tuple[bool, bool]:
        """Whether the compiler breaks the graph, alone and under `vmap`."""
        return not self.fullgraph, not (self.fullgraph if self.fullgraph_vmap is None else self.fullgraph_vmap)

    @property
    def may_have_batch(self) -> tuple[bool, ...]:
        return self.batched or (True,) * len(self.events)


def _normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- softmax --------------------------------------------------------------------------------------------------------


def _scores(batch: Batch, seed: int) -> Tensors:
    normal = _normal(seed)
    return normal(*batch, 4), 0.5 + normal(*batch, 1).square()


def _softmax(method: str) -> Operation:
    direct = method != "newton"
    return Operation(
        name="il.softmax" if method == "closed" else f"il.softmax: {method}",
        make=_scores,
        call=lambda x, temperature: (il.softmax(x, temperature=temperature, method=method),),
        events=(1, 1),
        fullgraph=direct,
        fake_cuda=method == "closed",
        syncs=(1, 0, 0) if direct else (5, 3, 1),
        # from the largest score's side Newton's steps are monotone and quadratic in the end
        iterations=None if direct else lambda x, temperature: torch.tensor(7),
    )


# --- the simplex family ---------------------------------------------------------------------------------------------


def _apart(batch: Batch, seed: int) -> Tensor:
    """Scores whose answers are well away from the kinks: nearly −1, 0, 0.3 and 0.5, in any order and at any height."""
    normal = _normal(seed)
    base = torch.tensor([0.5, 0.0, -1.0, 0.3], dtype=torch.float64)
    order = normal(*batch, 4).argsort(-1)
    return base.expand(*batch, 4).gather(-1, order) + 0.05 * normal(*batch, 4).tanh() + normal(*batch, 1)


def _with_temperature(batch: Batch, seed: int) -> Tensors:
    return _apart(batch, seed), 0.8 + 0.1 * _normal(seed + 1)(*batch, 1).tanh()


def _with_alpha(batch: Batch, seed: int) -> Tensors:
    return *_with_temperature(batch, seed), 1.5 + 0.2 * _normal(seed + 2)(*batch, 1).tanh()


def _with_k(batch: Batch, seed: int) -> Tensors:
    return *_with_temperature(batch, seed), 1.6 + 0.1 * _normal(seed + 2)(*batch, 1).tanh()


def _with_target(batch: Batch, seed: int) -> Tensors:
    return *_with_alpha(batch, seed), _normal(seed + 3)(*batch, 4)


def _loss(x: Tensor, temperature: Tensor, alpha: Tensor, target: Tensor) -> Tensors:
    return (il.fenchel_young_loss(x, target.softmax(-1), alpha, temperature=temperature),)


def _family(
    name: str,
    make: Callable[[Batch, int], Tensors],
    call: Callable[..., Tensors],
    *,
    steps: int,
    syncs: int = 2,
    **more: object,
) -> Operation:
    return Operation(
        name,
        make,
        call,
        events=tuple(x.ndim for x in make((), 0)),
        fullgraph=True,
        syncs=(syncs, 1, 0),
        iterations=lambda *tensors: torch.tensor(steps),
        **more,  # type: ignore[arg-type]
    )


FAMILY = (
    _family("il.sparsemax", _with_temperature, lambda x, t: (il.sparsemax(x, temperature=t),), steps=6, fake_cuda=True),
    _family("il.entmax: 1.5", _with_temperature, lambda x, t: (il.entmax(x, temperature=t),), steps=10, fake_cuda=True),
    _family(
        "il.entmax",
        _with_alpha,
        lambda x, t, a: (il.entmax(x, a, temperature=t),),
        steps=10,
        syncs=3,
        fake_cuda=True,
    ),
    _family("il.soft_top_k", _with_k, lambda x, t, k: (il.soft_top_k(x, k, temperature=t),), steps=16, syncs=4),
    _family(
        "il.soft_top_k: euclidean",
        _with_k,
        lambda x, t, k: (il.soft_top_k(x, k, temperature=t, regulariser="euclidean"),),
        steps=16,
        syncs=4,
    ),
    _family(
        "il.regularized_argmax",
        _with_k,
        lambda x, t, k: (il.regularized_argmax(x, "entropy", temperature=t, total=k),),
        steps=16,
        syncs=4,
    ),
    _family("il.fenchel_young_loss", _with_target, _loss, steps=10, syncs=6),
)


# --- quadratic programs ---------------------------------------------------------------------------------------------

QP_NAMES = ("Q", "p", "A", "b", "G", "h", "lb", "ub")
QP_EVENTS = dict(zip(QP_NAMES, (2, 1, 2, 1, 2, 1, 1, 1), strict=True))


def _solve_qp(what: str, n: int, n_ineq: int, n_eq: int, *, bounds: bool = False, linear: bool = False) -> Operation:
    """Linear programs have Q = 0, which is not among the inputs, and as many active constraints as unknowns."""
    missing = {"A": not n_eq, "b": not n_eq, "G": not n_ineq, "h": not n_ineq, "Q": linear}
    names = [name for name in QP_NAMES if not missing.get(name, not bounds and name in ("lb", "ub"))]

    def make(batch: Batch, seed: int) -> Tensors:
        share = 1.0 if linear else 0.5
        problem = il.testing.random_qp(n, n_ineq, n_eq, batch=batch, active=share, condition=10.0, seed=seed)
        data = problem._asdict()
        z, p = data["z"], data["p"]
        if linear:
            p = p + (data["Q"] @ z.unsqueeze(-1)).squeeze(-1)
        # the last unknown at its upper bound, with a clear dual, the others well inside
        last = torch.eye(n, dtype=z.dtype)[-1]
        data |= {"p": p - last if bounds else p, "lb": z - 20.0, "ub": z + 20.0 * (1 - last)}
        return tuple(data[name] for name in names)

    def solve(*tensors: Tensor) -> il.QPSolution:
        data = dict(zip(names, tensors, strict=True))
        if linear:
            data["Q"] = torch.zeros(n, n, dtype=data["p"].dtype, device=data["p"].device)
        return il.solve_qp(**data)

    def call(*tensors: Tensor) -> Tensors:
        z, nu, lam, s, _, lam_lb, lam_ub, value, _ = solve(*tensors)
        duals = (*((nu,) if n_eq else ()), *((lam, s) if n_ineq else ()), *((lam_lb, lam_ub) if bounds else ()))
        return z, *duals, value

    return Operation(
        name=f"il.solve_qp{what}",
        make=make,
        call=call,
        events=tuple(QP_EVENTS[name] for name in names),
        fullgraph=True,
        fullgraph_vmap=False,
        syncs=(40, 2, 2) if bounds or linear else (14, 2, 1) if n_ineq else (7, 0, 1),
        iterations=lambda *tensors: solve(*tensors).info.iterations,
    )


# --- entropy-regularised programs over polytopes, and transport plans -----------------------------------------------

POLYTOPE_NAMES = ("c", "A", "b", "G", "h", "ub", "temperature")
POLYTOPE_EVENTS = dict(zip(POLYTOPE_NAMES, (1, 2, 1, 2, 1, 1, 1), strict=True))


def _polytope(batch: Batch, seed: int) -> dict[str, Tensor]:
    """A polytope around a point, with every inequality well active or well slack."""
    normal = _normal(seed)
    point = torch.tensor([0.6, 0.3, 0.5, 0.4, 0.7], dtype=torch.float64)
    rows = torch.tensor([[0.9, 0.2, 0.5, 0.6, 0.3], [0.1, 0.8, 0.4, 0.3, 0.7]], dtype=torch.float64)
    A, G = rows + 0.05 * normal(*batch, 2, 5), torch.eye(2, 5, dtype=torch.float64) + 0.05 * normal(*batch, 2, 5)
    return {
        "c": 0.5 * normal(*batch, 5) + torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64),
        "A": A,
        "b": rows @ point + 0.02 * normal(*batch, 2),  # any b goes with any A: the gradients are tested one by one
        "G": G,
        "h": torch.tensor([0.6, 2.0], dtype=torch.float64) + 0.02 * normal(*batch, 2),
        "ub": point + 1.5 + 0.1 * normal(*batch, 5).square(),
        "temperature": 0.5 + 0.1 * normal(*batch, 1).square(),
    }


def _regularized_lp(regulariser: str) -> Operation:
    names = ("c", "A", "b", "temperature")

    def solve(*tensors: Tensor) -> il.Solution:
        return il.regularized_lp(regulariser=regulariser, **dict(zip(names, tensors, strict=True)))

    def make(batch: Batch, seed: int) -> Tensors:
        data = _polytope(batch, seed)
        return tuple(data[name] for name in names)

    return Operation(
        name=f"il.regularized_lp: {regulariser}",
        make=make,
        call=lambda *tensors: (solve(*tensors).value,),
        events=tuple(POLYTOPE_EVENTS[name] for name in names),
        syncs=(16, 8, 6),
        iterations=lambda *tensors: solve(*tensors).info.iterations,
    )


def _regularized_lp_loss(regulariser: str) -> Operation:
    """In the scores and the temperature; a target is a point of one polytope."""

    def rows(c: Tensor) -> dict[str, Tensor]:
        A = torch.tensor([[0.9, 0.2, 0.5, 0.6, 0.3], [0.1, 0.8, 0.4, 0.3, 0.7]], dtype=c.dtype, device=c.device)
        target = torch.tensor([0.6, 0.3, 0.5, 0.4, 0.7], dtype=c.dtype, device=c.device)
        return {"A": A, "b": A @ target, "target": target}

    def solve(c: Tensor, temperature: Tensor) -> il.Solution:
        data = rows(c)
        return il.regularized_lp(c, regulariser, A=data["A"], b=data["b"], temperature=temperature)

    def make(batch: Batch, seed: int) -> Tensors:
        data = _polytope(batch, seed)
        return data["c"], data["temperature"]

    return Operation(
        name=f"il.regularized_lp_loss: {regulariser}",
        make=make,
        call=lambda c, t: (il.regularized_lp_loss(c, regulariser=regulariser, temperature=t, **rows(c)),),
        events=(1, 1),
        syncs=(17, 8, 0),
        iterations=lambda c, t: solve(c, t).info.iterations,
    )


def _entropic_lp(what: str, names: tuple[str, ...], slack: str = "hard") -> Operation:
    def solve(*tensors: Tensor) -> il.Solution:
        return il.entropic_lp(**dict(zip(names, tensors, strict=True)), slack=slack)

    def make(batch: Batch, seed: int) -> Tensors:
        data = _polytope(batch, seed)
        return tuple(data[name] for name in names)

    return Operation(
        name=f"il.entropic_lp{what}",
        make=make,
        call=lambda *tensors: (solve(*tensors).value,),
        events=tuple(POLYTOPE_EVENTS[name] for name in names),
        syncs=(16, 8, 6),
        iterations=lambda *tensors: solve(*tensors).info.iterations,
    )


def _plan_data(batch: Batch, seed: int) -> Tensors:
    normal = _normal(seed)
    temperature = 0.3 + 0.1 * normal(*batch, 1, 1).square()
    return normal(*batch, 3, 4).square(), normal(*batch, 3), normal(*batch, 4), temperature


def _plan(C: Tensor, x: Tensor, y: Tensor, temperature: Tensor) -> il.Solution:
    return il.sinkhorn(C, x.softmax(-1), y.softmax(-1), temperature=temperature)


# --- the core: z = x + ¼ tanh(W z), and ridge-regularised logistic regression -----------------------------------------


def _affine(batch: Batch, seed: int) -> Tensors:
    normal = _normal(seed)
    return normal(*batch, 3, 3), normal(*batch, 3)


def _step(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return x + 0.25 * torch.tanh((W @ z.unsqueeze(-1)).squeeze(-1))


def _residual(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return z - _step(z, W, x)


def _start(W: Tensor, x: Tensor) -> Tensor:
    return x.new_zeros(torch.broadcast_shapes(W.shape[:-1], x.shape))


def _attached(W: Tensor, x: Tensor) -> Tensor:
    """Solve by hand, unseen by autograd, and attach the gradient."""
    with torch.no_grad():
        z = _start(W, x)
        for _ in range(60):
            z = _step(z, W, x)
    return il.attach_gradient(_residual, z, W, x)


def _data(batch: Batch, seed: int) -> Tensors:
    normal = _normal(seed)
    return normal(*batch, 4, 3), normal(*batch, 4).sigmoid()


def _logistic(z: Tensor, X: Tensor, target: Tensor) -> Tensor:
    scores = (X @ z.unsqueeze(-1)).squeeze(-1)
    loss = torch.nn.functional.softplus(scores) - target * scores
    return loss.sum(-1) + 0.5 * z.square().sum(-1)


def _fitted(X: Tensor, target: Tensor) -> il.Solution:
    batch = torch.broadcast_shapes(X.shape[:-2], target.shape[:-1])
    return il.argmin(_logistic, X.new_zeros(*batch, X.shape[-1]), X, target)


# --- projections, soft order, linear programs -------------------------------------------------------------------------


def _projection(name: str, make: Callable[..., Tensors], call: Callable[..., Tensor], **more: object) -> Operation:
    """A row whose inputs are drawn by `make(normal, batch)`, all of vectors unless it says otherwise."""
    events = tuple(x.ndim for x in make(_normal(0), ()))
    plain = {"fullgraph": True, "fake_cuda": True, "syncs": (1, 0, 0)}
    return Operation(
        name=name,
        make=lambda batch, seed: make(_normal(seed), batch),
        call=lambda *inputs: (call(*inputs),),
        events=events,
        **(plain | more),  # type: ignore[arg-type]
    )


def _bounds(normal: Callable[..., Tensor], batch: Batch) -> Tensors:
    return normal(*batch, 4), -0.5 - normal(*batch, 4).square(), 0.5 + normal(*batch, 4).square()


def _ball(normal: Callable[..., Tensor], batch: Batch) -> Tensors:
    return 2 * normal(*batch, 4), 0.5 + normal(*batch, 1).square()


def _plane(normal: Callable[..., Tensor], batch: Batch) -> Tensors:
    return normal(*batch, 4), normal(*batch, 4), normal(*batch, 1)


def _capped(normal: Callable[..., Tensor], batch: Batch) -> Tensors:
    return normal(*batch, 5), 0.5 + normal(*batch, 1).sigmoid(), 0.4 + 0.5 * normal(*batch, 5).sigmoid()


def _weighted(normal: Callable[..., Tensor], batch: Batch) -> Tensors:
    return normal(*batch, 5), 0.5 + normal(*batch, 5).square()


def _order(normal: Callable[..., Tensor], batch: Batch) -> Tensors:
    return normal(*batch, 5), 0.2 + normal(*batch, 1).sigmoid()


def _smoothed(normal: Callable[..., Tensor], batch: Batch) -> Tensors:
    A, G, inside = normal(*batch, 1, 4), normal(*batch, 3, 4), normal(*batch, 4)
    b, h = (A @ inside.unsqueeze(-1)).squeeze(-1), (G @ inside.unsqueeze(-1)).squeeze(-1) + normal(*batch, 3).sigmoid()
    return normal(*batch, 4), A, b, G, h, 0.5 + normal(*batch, 1).sigmoid()


def _smoothed_lp(c: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor, temperature: Tensor) -> il.Solution:
    return il.smoothed_lp(c, A=A, b=b, G=G, h=h, temperature=temperature)


def _one_hot(index: Tensor, n: int) -> Tensor:
    return (index.unsqueeze(-1) == torch.arange(n, device=index.device)).double()


def _perturbed(x: Tensor, sigma: Tensor) -> Tensor:
    torch.manual_seed(0)
    return il.perturbed_argmax(x, lambda scores: _one_hot(scores.argmax(-1), 4), sigma=sigma, samples=50)


NOISY = "an unbiased estimate from its own samples, which is not the derivative of the mean of these samples"
PROJECTIONS = (
    _projection("il.projections.box", _bounds, lambda x, lb, ub: il.projections.box(x, lb=lb, ub=ub)),
    _projection("il.projections.l2_ball", _ball, lambda x, r: il.projections.l2_ball(x, radius=r)),
    _projection(
        "il.projections.l1_ball",
        _ball,
        lambda x, r: il.projections.l1_ball(x, radius=r),
        syncs=(3, 1, 0),
        iterations=lambda x, r: torch.tensor(10),
    ),
    _projection(
        "il.projections.simplex",
        _ball,
        lambda x, r: il.projections.simplex(x, radius=r),
        syncs=(3, 1, 0),
        iterations=lambda x, r: torch.tensor(10),
    ),
    _projection(
        "il.projections.capped_simplex", _capped, lambda x, k, cap: il.projections.capped_simplex(x, k, cap=cap)
    ),
    _projection("il.projections.half_space", _plane, lambda x, a, b: il.projections.half_space(x, normal=a, offset=b)),
    _projection("il.projections.hyperplane", _plane, lambda x, a, b: il.projections.hyperplane(x, normal=a, offset=b)),
    _projection("il.projections.isotonic", _weighted, lambda x, w: il.projections.isotonic(x, weight=w)),
    _projection("il.projections.permutahedron", _weighted, il.projections.permutahedron),
    _projection(
        "il.projections.birkhoff",
        lambda normal, batch: (normal(*batch, 3, 3),),
        il.projections.birkhoff,
        fullgraph=False,
        fake_cuda=False,
        syncs=(3, 3, 0),
        iterations=lambda X: torch.tensor(12),
    ),
    _projection("il.soft_rank", _order, lambda x, tau: il.soft_rank(x, temperature=tau)),
    _projection("il.soft_sort", _order, lambda x, tau: il.soft_sort(x, temperature=tau)),
    _projection(
        "il.smoothed_lp",
        _smoothed,
        lambda *inputs: _smoothed_lp(*inputs).value,
        fullgraph=False,
        fake_cuda=False,
        syncs=(16, 2, 1),
        iterations=lambda *inputs: _smoothed_lp(*inputs).info.iterations,
    ),
    _projection(
        "il.spo_plus_loss",
        lambda normal, batch: (normal(*batch, 4), normal(*batch, 4)),
        lambda predicted, true: il.spo_plus_loss(
            predicted, true, lambda costs: _one_hot(costs.argmin(-1), 4), reduction="none"
        ),
        fullgraph=False,
        fake_cuda=False,
        syncs=(3, 0, 0),  # both answers of the solver are looked at
    ),
    _projection(
        "il.perturbed_argmax",
        lambda normal, batch: (normal(*batch, 4), 0.5 + normal(*batch, 1).square()),
        _perturbed,
        fullgraph=False,
        fake_cuda=False,
        syncs=(2, 0, 0),  # the answers of the solver are looked at
        exceptions=dict.fromkeys(
            (
                "`gradcheck`",
                "`gradgradcheck`",
                "forward mode, and over reverse",
                "batched gradients (`is_grads_batched`)",
                "`jvp`",
                "`jacrev`",
                "`jacfwd`",
                "`jacrev(jacrev)`",
                "`jacfwd(jacrev)`, `hessian`",
                "`jacrev(jacfwd)`",
                "`jacfwd(jacfwd)`",
            ),
            NOISY,
        )
        | dict.fromkeys(
            (
                "`vmap(grad)`, per-sample gradients",
                "`vmap(jacrev)`, `vmap(jacfwd)`",
                "several leading dimensions = loop over the elements",
            ),
            "every problem of a batch has noise of its own",
        )
        | {"float32 is close to float64 and stays float32": "PyTorch draws other numbers in float32"},
    ),
)


# --- modules --------------------------------------------------------------------------------------------------------


def _module(
    name: str,
    module: Callable[[], torch.nn.Module],
    state: Callable[[int], Tensors],
    width: int | tuple[int, ...],
    **more: object,
) -> Operation:
    held = module()
    shape = (width,) if isinstance(width, int) else width
    names = [key for key, _ in held.named_parameters()]

    def make(batch: Batch, seed: int) -> Tensors:
        return *state(seed), _normal(seed + 1000)(*batch, *shape)

    def call(*tensors: Tensor) -> Tensors:
        return (torch.func.functional_call(held, dict(zip(names, tensors[:-1], strict=True)), (tensors[-1],)),)

    events = (*(parameter.ndim for parameter in held.parameters()), len(shape))
    batched = (*(False for _ in names), True)
    return Operation(name, make, call, events, batched, module, **more)  # type: ignore[arg-type]


def _qp_layer() -> torch.nn.Module:
    return il.nn.QPLayer(3, n_eq=1, n_ineq=2, dtype=torch.float64)


def _qp_layer_state(seed: int) -> Tensors:
    normal = _normal(seed)
    L = torch.eye(3, dtype=torch.float64) + 0.1 * normal(3, 3)
    return L, normal(1, 3), normal(2, 3), 0.3 * normal(3), 0.3 * normal(2) - 1.0  # L, A, G, z0, log_slack


def _qp_layer_iterations(*tensors: Tensor) -> Tensor:
    layer = _qp_layer()
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), tensors[:-1], strict=True):
            parameter.copy_(value)
    return layer.solve(tensors[-1]).info.iterations


def _semi_amortized_vae() -> torch.nn.Module:
    model = il.vae.LatentModel(torch.nn.Linear(1, 2), 1)
    settings = {"noise": il.vae.Noise("cubature"), "outer_noise": "inner"}
    return il.nn.SemiAmortizedVAE.savi_implicit(torch.nn.Linear(2, 2), model, rho=0.7, **settings).double()


def _semi_amortized_vae_state(seed: int) -> Tensors:
    normal = _normal(seed)
    return 0.3 * normal(2, 2), 0.3 * normal(2), normal(2, 1), 0.3 * normal(2)  # encoder and decoder, W and b


def _semi_amortized_vae_iterations(*tensors: Tensor) -> Tensor:
    vae = _semi_amortized_vae()
    with torch.no_grad():
        for parameter, value in zip(vae.parameters(), tensors[:-1], strict=True):
            parameter.copy_(value)
    return vae(tensors[-1]).info.iterations


def _semi_amortized_vae_row() -> Operation:
    row = _module(
        "nn.SemiAmortizedVAE",
        _semi_amortized_vae,
        _semi_amortized_vae_state,
        2,
        syncs=(8, 3, 1),
        iterations=_semi_amortized_vae_iterations,
    )
    # the loss, and λ*; what the tests of modules expect is one tensor
    return replace(row, call=lambda *tensors: tuple(row.call(*tensors)[0][:2]), module=None)


def _softmax_layer() -> torch.nn.Module:
    return il.nn.Softmax(temperature=0.7, learn_temperature=True).double()


def _entropic_lp_layer() -> torch.nn.Module:
    A, b, _ = _entropic_lp_layer_state(0)
    return il.nn.EntropicLP(A=torch.nn.Parameter(A), b=torch.nn.Parameter(b), temperature=0.7, learn_temperature=True)


def _entropic_lp_layer_state(seed: int) -> Tensors:
    A = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.2, 0.9, 0.4, 0.6]], dtype=torch.float64)
    A = A + 0.02 * _normal(seed)(2, 4)
    return A, torch.tensor([1.1, 0.6], dtype=torch.float64), torch.tensor(-0.3, dtype=torch.float64)


def _regularized_lp_layer() -> torch.nn.Module:
    A, b, _ = _entropic_lp_layer_state(0)
    rows = {"A": torch.nn.Parameter(A), "b": torch.nn.Parameter(b)}
    return il.nn.RegularizedLP("binary_entropy", **rows, temperature=0.7, learn_temperature=True)


def _sinkhorn_layer() -> torch.nn.Module:
    return il.nn.Sinkhorn(temperature=0.7, learn_temperature=True).double()


def _projection_layer() -> torch.nn.Module:
    normal, offset = (torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (4, 1))
    return il.nn.Projection(il.projections.half_space, normal=normal, offset=offset)


def _soft_order(kind: type[torch.nn.Module]) -> Operation:
    return _module(
        f"nn.{kind.__name__}",
        lambda: kind(temperature=0.7, learn_temperature=True).double(),
        lambda seed: (torch.tensor(-0.3, dtype=torch.float64),),
        4,
        fullgraph=True,
        fake_cuda=True,
        syncs=(1, 0, 0),
    )


OPERATIONS = (
    _softmax("closed"),
    _softmax("newton"),
    _softmax("kkt"),
    *FAMILY,
    _solve_qp("", 3, 2, 1),
    _solve_qp(": inequalities", 3, 3, 0),
    _solve_qp(": equalities", 3, 0, 2),
    _solve_qp(": bounds", 3, 2, 1, bounds=True),
    _solve_qp(": linear program", 3, 1, 1, bounds=True, linear=True),
    _entropic_lp("", ("c", "A", "b", "temperature")),
    _regularized_lp("euclidean"),
    _regularized_lp("binary_entropy"),
    _regularized_lp_loss("euclidean"),
    _entropic_lp(": inequalities", POLYTOPE_NAMES),
    _entropic_lp(": entropic slack", POLYTOPE_NAMES, "entropic"),
    Operation(
        name="il.sinkhorn",
        make=_plan_data,
        call=lambda *tensors: (_plan(*tensors).value,),
        events=(2, 1, 1, 2),
        syncs=(12, 3, 3),
        iterations=lambda *tensors: _plan(*tensors).info.iterations,
    ),
    Operation(
        name="il.root",
        make=_affine,
        call=lambda W, x: (il.root(_residual, _start(W, x), W, x).value,),
        events=(2, 1),
        syncs=(5, 3, 1),
        iterations=lambda W, x: il.root(_residual, _start(W, x), W, x).info.iterations,
    ),
    Operation(
        name="il.fixed_point",
        make=_affine,
        call=lambda W, x: (il.fixed_point(_step, _start(W, x), W, x).value,),
        events=(2, 1),
        syncs=(3, 1, 1),
        iterations=lambda W, x: il.fixed_point(_step, _start(W, x), W, x).info.iterations,
    ),
    Operation(
        name="il.argmin",
        make=_data,
        call=lambda X, target: (_fitted(X, target).value,),
        events=(2, 1),
        syncs=(5, 3, 1),
        iterations=lambda X, target: _fitted(X, target).info.iterations,
    ),
    Operation(
        name="il.attach_gradient",
        make=_affine,
        call=lambda W, x: (_attached(W, x),),
        events=(2, 1),
        syncs=(0, 0, 1),
    ),
    Operation(
        name="il.unroll",
        make=_affine,
        call=lambda W, x: (il.unroll(_step, _start(W, x), W, x, steps=20),),
        events=(2, 1),
        fullgraph=True,
        fake_cuda=True,
    ),
    Operation(
        name="il.unroll: reversible",
        make=_affine,
        call=lambda W, x: (il.unroll(_step, _start(W, x), W, x, steps=60, mode="reversible", momentum=0.1),),
        events=(2, 1),
        syncs=(1, 1, 1),
        iterations=lambda W, x: torch.tensor(60),
    ),
    _module(
        "nn.Softmax",
        _softmax_layer,
        lambda seed: (torch.tensor(-0.3, dtype=torch.float64),),
        4,
        fullgraph=True,
        fake_cuda=True,
        syncs=(1, 0, 0),
    ),
    _module(
        "nn.QPLayer",
        _qp_layer,
        _qp_layer_state,
        3,
        fullgraph=True,
        fullgraph_vmap=False,
        syncs=(14, 2, 1),
        iterations=_qp_layer_iterations,
    ),
    _module(
        "nn.Sparsemax",
        lambda: il.nn.Sparsemax(learn_temperature=True).double(),
        lambda seed: (torch.tensor(0.4, dtype=torch.float64),),
        4,
        fullgraph=True,
        syncs=(2, 1, 0),
        iterations=lambda *tensors: torch.tensor(10),
    ),
    _module(
        "nn.SoftTopK",
        lambda: il.nn.SoftTopK(2, temperature=0.8, learn_temperature=True).double(),
        lambda seed: (torch.tensor(-0.2, dtype=torch.float64),),
        4,
        fullgraph=True,
        syncs=(4, 1, 0),
        iterations=lambda *tensors: torch.tensor(16),
    ),
    _module(
        "nn.Entmax",
        lambda: il.nn.Entmax(1.5, learn_temperature=True, learn_alpha=True).double(),
        lambda seed: (torch.tensor(-0.2, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)),
        4,
        fullgraph=True,
        syncs=(3, 1, 0),
        iterations=lambda *tensors: torch.tensor(10),
    ),
    _module(
        "nn.EntropicLP",
        _entropic_lp_layer,
        _entropic_lp_layer_state,
        4,
        syncs=(16, 8, 6),
        iterations=lambda *tensors: torch.tensor(20),
    ),
    _module(
        "nn.RegularizedLP",
        _regularized_lp_layer,
        _entropic_lp_layer_state,
        4,
        syncs=(16, 8, 6),
        iterations=lambda *tensors: torch.tensor(20),
    ),
    _module(
        "nn.Sinkhorn",
        _sinkhorn_layer,
        lambda seed: (torch.tensor(-0.3, dtype=torch.float64),),
        (3, 4),
        syncs=(12, 3, 3),
        iterations=lambda *tensors: torch.tensor(40),
    ),
    *PROJECTIONS,
    _module(
        "nn.Projection",
        _projection_layer,
        lambda seed: (_normal(seed)(4), _normal(seed + 1)(1)),
        4,
        fullgraph=True,
        fake_cuda=True,
        syncs=(1, 0, 0),
    ),
    _soft_order(il.nn.SoftRank),
    _soft_order(il.nn.SoftSort),
    _semi_amortized_vae_row(),
)
