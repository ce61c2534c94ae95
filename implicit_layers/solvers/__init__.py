"""Solvers: one file a method, each a frozen dataclass that knows nothing of derivatives."""

from implicit_layers.solvers.anderson import Anderson as Anderson
from implicit_layers.solvers.fixed_point_iteration import FixedPointIteration as FixedPointIteration
from implicit_layers.solvers.gradient_descent import GradientDescent as GradientDescent
from implicit_layers.solvers.interior_point import InteriorPoint as InteriorPoint
from implicit_layers.solvers.lbfgs import LBFGS as LBFGS
from implicit_layers.solvers.newton import Newton as Newton
from implicit_layers.solvers.semismooth_newton import SemismoothNewton as SemismoothNewton
