"""Layers defined by a condition: the output solves a system, the gradient comes from the implicit function theorem."""

__version__ = "0.1.0"

from implicit_layers import nn as nn
from implicit_layers import testing as testing
from implicit_layers.errors import CapturedTensorError as CapturedTensorError
from implicit_layers.errors import ConvergenceError as ConvergenceError
from implicit_layers.errors import ConvergenceWarning as ConvergenceWarning
from implicit_layers.errors import DegenerateGradientWarning as DegenerateGradientWarning
from implicit_layers.errors import DeviceError as DeviceError
from implicit_layers.errors import DtypeError as DtypeError
from implicit_layers.errors import ImplicitLayersError as ImplicitLayersError
from implicit_layers.errors import ImplicitLayersWarning as ImplicitLayersWarning
from implicit_layers.errors import InfeasibleError as InfeasibleError
from implicit_layers.errors import MissingDependencyError as MissingDependencyError
from implicit_layers.errors import NonFiniteError as NonFiniteError
from implicit_layers.errors import NotPositiveDefiniteError as NotPositiveDefiniteError
from implicit_layers.errors import ShapeError as ShapeError
from implicit_layers.errors import SingularAdjointError as SingularAdjointError
from implicit_layers.errors import SolveError as SolveError
from implicit_layers.errors import UnboundedError as UnboundedError
from implicit_layers.implicit import argmin as argmin
from implicit_layers.implicit import attach_gradient as attach_gradient
from implicit_layers.implicit import fixed_point as fixed_point
from implicit_layers.implicit import root as root
from implicit_layers.implicit import root_jvp as root_jvp
from implicit_layers.implicit import root_vjp as root_vjp
from implicit_layers.krylov import GMRES as GMRES
from implicit_layers.krylov import ConjugateGradient as ConjugateGradient
from implicit_layers.krylov import Neumann as Neumann
from implicit_layers.linalg import Cholesky as Cholesky
from implicit_layers.linalg import Direct as Direct
from implicit_layers.linalg import LeastSquares as LeastSquares
from implicit_layers.qp import solve_qp as solve_qp
from implicit_layers.simplex import softmax as softmax
from implicit_layers.solution import QPSolution as QPSolution
from implicit_layers.solution import Solution as Solution
from implicit_layers.solution import SolveInfo as SolveInfo
from implicit_layers.solution import Status as Status
from implicit_layers.solvers.anderson import Anderson as Anderson
from implicit_layers.solvers.fixed_point_iteration import FixedPointIteration as FixedPointIteration
from implicit_layers.solvers.gradient_descent import GradientDescent as GradientDescent
from implicit_layers.solvers.interior_point import InteriorPoint as InteriorPoint
from implicit_layers.solvers.lbfgs import LBFGS as LBFGS
from implicit_layers.solvers.newton import Newton as Newton
from implicit_layers.unrolled import unroll as unroll
