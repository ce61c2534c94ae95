"""Every exception and warning of the package; each message says what, where, by how much and what to do."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

_NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, str(torch.__file__)))


class ImplicitLayersError(Exception):
    """Base of every error that this package raises on purpose."""


class ShapeError(ImplicitLayersError, ValueError):
    """An argument's shape does not fit the others."""


class DtypeError(ImplicitLayersError, TypeError):
    """An argument is no tensor, no floating-point tensor, or of another dtype than the others."""


class ArgumentError(ImplicitLayersError, ValueError):
    """A setting is out of its range, or arguments contradict each other."""


class ArgumentTypeError(ImplicitLayersError, TypeError):
    """A setting is of the wrong type."""


class UnsupportedError(ImplicitLayersError, NotImplementedError):
    """What was asked for is not there yet."""


class DeviceError(ImplicitLayersError, ValueError):
    """The arguments live on different devices."""


class NonFiniteError(ImplicitLayersError, ValueError):
    """An argument holds NaN or infinity where a number is needed."""


class NotPositiveDefiniteError(ImplicitLayersError, ValueError):
    """A matrix that must be positive definite is not."""


class CapturedTensorError(ImplicitLayersError, ValueError):
    """A residual closes over a tensor that requires grad, which would get no gradient."""


class MissingDependencyError(ImplicitLayersError, ImportError):
    """An optional package is needed and not installed."""


class SolveError(ImplicitLayersError, RuntimeError):
    """A solve did not end in a solution."""


class ConvergenceError(SolveError):
    """The tolerance was not reached."""


class InfeasibleError(SolveError):
    """No point satisfies the constraints; the solver holds a certificate of it."""


class UnboundedError(SolveError):
    """The objective decreases without limit on the feasible set."""


class SingularAdjointError(SolveError):
    """The transposed Jacobian could not be solved: the derivative does not exist or is not unique."""


class ImplicitLayersWarning(UserWarning):
    """Base of every warning of this package."""


class ConvergenceWarning(ImplicitLayersWarning):
    """Some problems of a batch did not converge; they keep their last iterate and get zero gradient."""


class DegenerateGradientWarning(ImplicitLayersWarning):
    """The solution is right, but its derivative is not unique; a defined element of it is used."""


def warn(message: str, category: type[ImplicitLayersWarning]) -> None:
    """Warn on the line of the user's code that led here: the innermost one outside this package and PyTorch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
