"""Layers defined by a condition: the output solves a system, the gradient comes from the implicit function theorem."""

__version__ = "0.1.0"

from implicit_layers import nn as nn
from implicit_layers import testing as testing
from implicit_layers.qp import solve_qp as solve_qp
from implicit_layers.simplex import softmax as softmax
from implicit_layers.solvers.interior_point import InteriorPoint as InteriorPoint
from implicit_layers.unrolled import unroll as unroll
