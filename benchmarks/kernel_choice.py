"""numba or C++ for the compiled kernel: `python -m benchmarks.kernel_choice [--quick] [--out FOLDER]`, on one thread.

The building block that decides is the batched Cholesky factorisation with SIMD across instances: eight float64
matrices interleaved, entry (i, j) of all of them side by side. The same left-looking method in blocks of registers is
written for g++ with vector extensions, and for numba as plain loops and with lanes and blocks written out, for LLVM's
SLP vectoriser. Calls of all kernels alternate, in an order drawn for each round; torch.linalg.cholesky, on its own
layout, is there for orientation. numba compiles when it is first called, again for every dtype.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import math
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.run import RESULTS, save

LANES = 8
SIZES = (10, 20, 50, 100)
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")

Array = NDArray[np.float64]
Call = Callable[[], Any]


class Kernel(NamedTuple):
    """A kernel, and what it costs before it runs: loading what it needs, and compiling."""

    bind: Callable[[Array, Array], Call]  # A and L, (batch / 8, n, n, 8): a call fills in the lower triangles of L
    import_s: float
    compile_s: float


# --- C++ ------------------------------------------------------------------------------------------------------------

SOURCE = r"""
#include <cmath>
typedef double lanes __attribute__((vector_size(64)));

static inline lanes root(lanes x) {
    for (int l = 0; l < 8; ++l) x[l] = std::sqrt(x[l]);
    return x;
}

// s = A_ij - sum_k L_ik L_jk', a block of R x C kept in registers
template <int R, int C>
static inline __attribute__((always_inline)) void left(
    const lanes *A, const lanes *Li, const lanes *Lj, int n, int k_end, lanes (&s)[R][C]) {
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) s[r][c] = A[r * n + c];
    for (int k = 0; k < k_end; ++k) {
        lanes b[C];
        for (int c = 0; c < C; ++c) b[c] = Lj[c * n + k];
        for (int r = 0; r < R; ++r) {
            const lanes a = Li[r * n + k];
            for (int c = 0; c < C; ++c) s[r][c] -= a * b[c];
        }
    }
}

template <int R, int C>
static inline __attribute__((always_inline)) void below(
    const lanes *A, lanes *L, int n, int i, int j, const lanes (&d)[C][C], const lanes (&inverse)[C]) {
    lanes s[R][C];
    left<R, C>(A + i * n + j, L + i * n, L + j * n, n, j, s);
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) {
            for (int k = 0; k < c; ++k) s[r][c] -= s[r][k] * d[c][k];
            s[r][c] *= inverse[c];
            L[(i + r) * n + j + c] = s[r][c];
        }
}

template <int C>
static inline __attribute__((always_inline)) void columns(const lanes *A, lanes *L, int n, int j) {
    lanes d[C][C], inverse[C];
    left<C, C>(A + j * n + j, L + j * n, L + j * n, n, j, d);
    for (int c = 0; c < C; ++c)
        for (int r = c; r < C; ++r) {
            for (int k = 0; k < c; ++k) d[r][c] -= d[r][k] * d[c][k];
            if (r == c) {
                d[c][c] = root(d[c][c]);
                inverse[c] = 1.0 / d[c][c];
            } else {
                d[r][c] *= inverse[c];
            }
            L[(j + r) * n + j + c] = d[r][c];
        }
    int i = j + C;
    for (; i + 4 <= n; i += 4) below<4, C>(A, L, n, i, j, d, inverse);
    switch (n - i) {
        case 1: below<1, C>(A, L, n, i, j, d, inverse); break;
        case 2: below<2, C>(A, L, n, i, j, d, inverse); break;
        case 3: below<3, C>(A, L, n, i, j, d, inverse); break;
    }
}

extern "C" void factor(const lanes *A, lanes *L, int n, int groups) {
    for (int g = 0; g < groups; ++g, A += n * n, L += n * n) {
        int j = 0;
        for (; j + 4 <= n; j += 4) columns<4>(A, L, n, j);
        switch (n - j) {
            case 1: columns<1>(A, L, n, j); break;
            case 2: columns<2>(A, L, n, j); break;
            case 3: columns<3>(A, L, n, j); break;
        }
    }
}
"""


def by_compiler() -> Kernel | None:
    """The C++ kernel, by the system's compiler; None where there is none."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "factor.cpp", Path(folder) / "factor.so"
        source.write_text(SOURCE, encoding="utf-8")
        start = time.perf_counter()
        subprocess.run([compiler, *FLAGS, "-o", str(library), str(source)], check=True)
        compiled = time.perf_counter()
        call = ctypes.CDLL(str(library)).factor
        loaded = time.perf_counter()

    def bind(A: Array, L: Array) -> Call:
        pointers = (x.ctypes.data_as(ctypes.c_void_p) for x in (A, L))  # these keep the arrays alive
        arguments = (*pointers, A.shape[1], A.shape[0])
        return lambda: call(*arguments)

    return Kernel(bind, loaded - compiled, compiled - start)


# --- numba ----------------------------------------------------------------------------------------------------------


def plain(A: Array, L: Array) -> None:
    """Left-looking, entry by entry, the lanes innermost: what one would write first."""
    for g in range(A.shape[0]):
        for j in range(A.shape[1]):
            for i in range(j, A.shape[1]):
                s = L[g, i, j]
                for lane in range(LANES):
                    s[lane] = A[g, i, j, lane]
                for k in range(j):
                    for lane in range(LANES):
                        s[lane] -= L[g, i, k, lane] * L[g, j, k, lane]
                for lane in range(LANES):
                    s[lane] = math.sqrt(s[lane]) if i == j else s[lane] / L[g, j, j, lane]


def written_out(block: int) -> str:
    """The text of `factor(A, L)` in blocks of that size, every entry and lane of a block a variable of its own."""
    sizes = range(1, block + 1)
    lines = [line for C in sizes for R in (0, *sizes) for line in _block(R, C)]
    lines += ["def factor(A, L):", "  n = A.shape[1]", "  for g in range(A.shape[0]):", "    j = 0", "    while j < n:"]
    for C in reversed(sizes):
        lines += [f"      {'if' if block == C else 'elif'} n - j >= {C}:", f"        columns_0_{C}(A, L, g, j, j)"]
        lines += [f"        i = j + {C}", f"        while n - i >= {block}:"]
        lines += [f"          columns_{block}_{C}(A, L, g, i, j)", f"          i += {block}"]
        for R in sizes[:-1]:
            lines += [f"        if n - i == {R}:", f"          columns_{R}_{C}(A, L, g, i, j)"]
        lines += [f"        j += {C}"]
    return "\n".join(lines)


def _block(R: int, C: int) -> Iterator[str]:
    """The function of R rows from i on, in C columns from j on; R = 0: of the block on the diagonal."""
    entries = [(r, c) for r in range(R or C) for c in range(C) if R or c <= r]
    lanes = range(LANES)
    yield f"def columns_{R}_{C}(A, L, g, i, j):"
    yield from (f"  s{r}{c}{v} = A[g, i + {r}, j + {c}, {v}]" for r, c in entries for v in lanes)
    yield "  for k in range(j):"
    yield from (f"    b{c}{v} = L[g, j + {c}, k, {v}]" for c in range(C) for v in lanes)
    if R:
        yield from (f"    a{r}{v} = L[g, i + {r}, k, {v}]" for r in range(R) for v in lanes)
    left = "a" if R else "b"
    yield from (f"    s{r}{c}{v} -= {left}{r}{v} * b{c}{v}" for r, c in entries for v in lanes)
    for c in range(C):
        for r in (r for r, column in entries if column == c):
            for v in lanes:
                right = [f"L[g, j + {c}, j + {k}, {v}]" if R else f"s{c}{k}{v}" for k in range(c)]
                yield from (f"  s{r}{c}{v} -= s{r}{k}{v} * {right[k]}" for k in range(c))
                pivot = f"L[g, j + {c}, j + {c}, {v}]" if R else f"s{c}{c}{v}"
                yield f"  s{r}{c}{v} = " + (f"sqrt({pivot})" if r == c and not R else f"s{r}{c}{v} / {pivot}")
    yield from (f"  L[g, i + {r}, j + {c}, {v}] = s{r}{c}{v}" for r, c in entries for v in lanes)


def functions(text: str, decorate: Callable[[Any], Any] = lambda function: function) -> Callable[[Array, Array], None]:
    """`factor` of that text, each of its functions decorated."""
    names: dict[str, Any] = {"sqrt": math.sqrt}
    exec(text, names)
    for name in [name for name in names if name.startswith(("columns_", "factor"))]:
        names[name] = decorate(names[name])
    return names["factor"]


@lru_cache
def _numba() -> tuple[Any, float]:
    """The module, None where it is not installed, and how long its import took."""
    os.environ["NUMBA_SLP_VECTORIZE"] = "1"  # off by default; it is what turns eight variables into one register
    start = time.perf_counter()
    try:
        module = importlib.import_module("numba")
    except ImportError:
        return None, 0.0
    return module, time.perf_counter() - start


def by_numba(block: int) -> Kernel | None:
    """A kernel by numba, in blocks of that size or, for 0, as plain loops; None where numba is not installed."""
    numba, import_s = _numba()
    if numba is None:
        return None
    start = time.perf_counter()
    decorate = numba.njit(fastmath=True, error_model="numpy", boundscheck=False)
    factor = functions(written_out(block), decorate) if block else decorate(plain)
    eye = np.tile(np.eye(2)[None, :, :, None], (1, 1, 1, LANES))
    factor(eye, eye.copy())
    return Kernel(lambda A, L: lambda: factor(A, L), import_s, time.perf_counter() - start)


# --- measuring ------------------------------------------------------------------------------------------------------


def by_torch() -> Kernel:
    """torch.linalg.cholesky of the matrices one behind the other; its answer is not copied back."""

    def bind(A: Array, L: Array) -> Call:
        matrices = torch.from_numpy(matrices_of(A))
        L[:] = lanes_of(torch.linalg.cholesky(matrices).numpy())
        return lambda: torch.linalg.cholesky(matrices)

    return Kernel(bind, 0.0, 0.0)


KERNELS: dict[str, Callable[[], Kernel | None]] = {
    "C++": by_compiler,
    "numba, plain loops": lambda: by_numba(0),
    "numba, blocks of 2 written out": lambda: by_numba(2),
    "numba, blocks of 3 written out": lambda: by_numba(3),
    "torch.linalg.cholesky": by_torch,
}


def lanes_of(matrices: Array) -> Array:  # (batch, n, n) -> (batch / 8, n, n, 8)
    """The matrices interleaved, the first entry at a multiple of 64 bytes."""
    batch, n, _ = matrices.shape
    memory = np.zeros(matrices.size + LANES)
    start = -memory.ctypes.data % 64 // memory.itemsize
    interleaved = memory[start : start + matrices.size].reshape(batch // LANES, n, n, LANES)
    interleaved[:] = matrices.reshape(batch // LANES, LANES, n, n).transpose(0, 2, 3, 1)
    return interleaved


def matrices_of(interleaved: Array) -> Array:  # (batch / 8, n, n, 8) -> (batch, n, n)
    """The matrices one behind the other."""
    groups, n, _, _ = interleaved.shape
    return np.ascontiguousarray(interleaved.transpose(0, 3, 1, 2)).reshape(groups * LANES, n, n)


def positive_definite(n: int, batch: int, seed: int = 0) -> Array:  # (batch, n, n)
    """X Xᵀ/n + 0.1 I, X standard normal."""
    X = np.random.default_rng(seed).standard_normal((batch, n, n))
    return X @ X.transpose(0, 2, 1) / n + 0.1 * np.eye(n)


def measure(kernels: dict[str, Kernel], n: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Median times of the kernels in turns, and how far their factors are from LAPACK's."""
    matrices = positive_definite(n, batch)
    expected, A = np.linalg.cholesky(matrices), lanes_of(matrices)
    calls: dict[str, Call] = {}
    error: dict[str, float] = {}
    L = lanes_of(np.zeros_like(matrices))  # one for all, so that they find the caches alike
    for name, kernel in kernels.items():
        L[:] = 0.0
        calls[name] = kernel.bind(A, L)
        calls[name]()
        error[name] = float(np.abs(matrices_of(L) - expected).max())
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls), random.Random(0)
    for _ in range(repeats):
        shuffled.shuffle(order)  # what runs before leaves its data in the caches
        for name in order:
            call = calls[name]
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    rows = []
    for name, seconds in medians.items():
        row = {"kernel": name, "n": n, "batch": batch, "ms": 1e3 * seconds, "error": error[name]}
        row["gflops"] = batch * n**3 / 3 / seconds / 1e9
        if "C++" in medians:
            row["times_longer"] = seconds / medians["C++"]
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.kernel_choice", description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="small matrices, few repeats, no large blocks")
    arguments.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = arguments.parse_args(argv)
    kernels: dict[str, Kernel] = {}
    rows: list[dict[str, Any]] = []
    for name, make in KERNELS.items():
        if options.quick and "written out" in name:
            continue
        made = make()
        if made is None:
            rows.append({"kernel": name, "status": "not installed"})
        else:
            kernels[name] = made
    costs = {}
    for name, kernel in kernels.items():
        costs[name] = {"import_s": round(kernel.import_s, 2), "compile_s": round(kernel.compile_s, 1)}
    for n in (5, 8) if options.quick else SIZES:
        rows += measure(kernels, n, 16 if options.quick else 128, 3 if options.quick else 201)
    for row in rows:
        figures = ", ".join(f"{key} {row[key]:.3g}" for key in ("ms", "times_longer", "error") if key in row)
        print(f"{row['kernel']}, n = {row['n']}: {figures}" if figures else f"{row['kernel']}: {row['status']}")
    print(costs)
    print(save(options.out, "kernel_choice", options.quick, rows, costs=costs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
