"""Code that `torch.compile` must not look into: solvers stop on data, which a compiled graph cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, always run eagerly; a compiled caller's graph ends at it and goes on after.

    The compiler takes seconds to import, so it is not asked for unless it is there already.
    """
    disabled: Callable[P, R] | None = None

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if not _compiler_is_here():
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return run


def _compiler_is_here() -> bool:
    """Whether the compiler was imported: a constant, or it would look through all modules for its own name."""
    return "torch._dynamo" in sys.modules


# what `torch.compiler.assume_constant_result` does, which would take seconds to import the compiler
_compiler_is_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transforms_at_work() -> frozenset[str]:
    """The kinds of `torch.func` transforms that are running: "Grad", "Jvp", "Vmap", ...

    The compiler takes the answer as a constant of the graph, which it makes anew when the transforms change.
    """
    return frozenset(_kinds())


transforms_at_work._dynamo_marked_constant = True  # type: ignore[attr-defined]


def differentiations() -> int:
    """How often what is computed now may be differentiated: by every transform that is running, and once afterwards.

    A constant of the graph too.
    """
    return 1 + sum(kind in ("Grad", "Jvp") for kind in _kinds())


def _deep_forward_mode() -> bool:
    """Whether forward mode runs with more than one other level, which the compiler cannot trace; a constant too."""
    kinds = _kinds()
    return "Jvp" in kinds and (kinds.count("Jvp") > 1 or kinds.count("Grad") > 1)


def _kinds() -> list[str]:
    """The kinds of the transforms that are running, one by one."""
    return [
        str(interpreter.key()).rpartition(".")[2] for interpreter in torch._C._functorch.get_interpreter_stack() or ()
    ]


def traced() -> bool:
    """Whether the compiler traces what is computed now, and can trace its derivatives."""
    return torch.compiler.is_compiling() and not _deep_forward_mode()


differentiations._dynamo_marked_constant = True  # type: ignore[attr-defined]
_deep_forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]
