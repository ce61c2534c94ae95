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
    fake_cuda: bool = False
    syncs: tuple[int, int, int] = (0, 0, 0)
    iterations: Callable[..., Tensor] | None = None
    exceptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def public_name(self) -> str:
        return self.name.partition(":")[0]

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


# --- quadratic programs ---------------------------------------------------------------------------------------------

QP_NAMES = ("Q", "p", "A", "b", "G", "h")
QP_EVENTS = dict(zip(QP_NAMES, (2, 1, 2, 1, 2, 1), strict=True))


def _solve_qp(what: str, n: int, n_ineq: int, n_eq: int) -> Operation:
    names = [name for name in QP_NAMES if {"A": n_eq, "b": n_eq, "G": n_ineq, "h": n_ineq}.get(name, 1)]

    def make(batch: Batch, seed: int) -> Tensors:
        problem = il.testing.random_qp(n, n_ineq, n_eq, batch=batch, active=0.5, condition=10.0, seed=seed)
        return tuple(getattr(problem, name) for name in names)

    def solve(*tensors: Tensor) -> il.QPSolution:
        return il.solve_qp(**dict(zip(names, tensors, strict=True)))

    def call(*tensors: Tensor) -> Tensors:
        solution = solve(*tensors)
        return solution.z, *((solution.nu,) if n_eq else ()), *((solution.lam, solution.s) if n_ineq else ())

    return Operation(
        name=f"il.solve_qp{what}",
        make=make,
        call=call,
        events=tuple(QP_EVENTS[name] for name in names),
        syncs=(13, 2, 1) if n_ineq else (6, 0, 1),
        iterations=lambda *tensors: solve(*tensors).info.iterations,
    )


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


# --- modules --------------------------------------------------------------------------------------------------------


def _module(
    name: str, module: Callable[[], torch.nn.Module], state: Callable[[int], Tensors], width: int, **more: object
) -> Operation:
    held = module()
    names = [key for key, _ in held.named_parameters()]

    def make(batch: Batch, seed: int) -> Tensors:
        return *state(seed), _normal(seed + 1000)(*batch, width)

    def call(*tensors: Tensor) -> Tensors:
        return (torch.func.functional_call(held, dict(zip(names, tensors[:-1], strict=True)), (tensors[-1],)),)

    events = (*(parameter.ndim for parameter in held.parameters()), 1)
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


OPERATIONS = (
    _softmax("closed"),
    _softmax("newton"),
    _softmax("kkt"),
    _solve_qp("", 3, 2, 1),
    _solve_qp(": inequalities", 3, 3, 0),
    _solve_qp(": equalities", 3, 0, 2),
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
    _module(
        "nn.Softmax",
        _softmax_layer,
        lambda seed: (torch.tensor(-0.3, dtype=torch.float64),),
        4,
        fullgraph=True,
        fake_cuda=True,
        syncs=(1, 0, 0),
    ),
    _module("nn.QPLayer", _qp_layer, _qp_layer_state, 3, syncs=(13, 2, 1), iterations=_qp_layer_iterations),
    _semi_amortized_vae_row(),
)
