"""Answers questions about quadratic programs with qpax; run by the interpreter that has it, see qpax_process.py."""

import importlib.metadata
import pickle
import sys
import time
from functools import partial

import jax
import qpax

jax.config.update("jax_enable_x64", True)
SETTINGS = {"backend": "i", "solver_tol": 1e-10, "target_kappa": 1e-8}


def primal(Q, p, A, b, G, h):
    return qpax.solve_qp_primal(Q, p, A, b, G, h, **SETTINGS)


def loss(arguments, c):
    return (c * jax.vmap(primal)(*arguments)).sum()


forward = jax.jit(jax.vmap(primal))
gradient = jax.jit(jax.grad(loss))
duals = jax.jit(jax.vmap(partial(qpax.solve_qp, backend="i", solver_tol=1e-10)))


def solve(*arrays):
    arguments, c = tuple(map(jax.numpy.asarray, arrays[:-1])), jax.numpy.asarray(arrays[-1])
    _, _, lam, nu, _, _ = duals(*arguments)
    answer = (forward(*arguments), nu, lam)
    return jax.device_get(answer), jax.device_get(gradient(arguments, c))


def timed(*arrays):
    arguments, c = tuple(map(jax.numpy.asarray, arrays[:-1])), jax.numpy.asarray(arrays[-1])
    marks = [time.perf_counter()]
    jax.block_until_ready(forward(*arguments))
    marks.append(time.perf_counter())
    jax.block_until_ready(gradient(arguments, c))
    marks.append(time.perf_counter())
    return 1e3 * (marks[1] - marks[0]), 1e3 * (marks[2] - marks[1])


QUESTIONS = {"version": lambda: importlib.metadata.version("qpax"), "solve": solve, "time": timed}

while True:
    try:
        question, arrays = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    try:
        answer = True, QUESTIONS[question](*arrays)
    except Exception as error:  # noqa: BLE001  (whatever it is, the other side reports it)
        answer = False, f"{type(error).__name__}: {error}"
    pickle.dump(answer, sys.stdout.buffer)
    sys.stdout.buffer.flush()
