"""Modules: they hold parameters and settings and call one function each."""

from implicit_layers.nn.programs import PerturbedArgmax as PerturbedArgmax
from implicit_layers.nn.programs import SPOPlusLoss as SPOPlusLoss
from implicit_layers.nn.projections import Projection as Projection
from implicit_layers.nn.projections import SoftRank as SoftRank
from implicit_layers.nn.projections import SoftSort as SoftSort
from implicit_layers.nn.quadratic import QPData as QPData
from implicit_layers.nn.quadratic import QPLayer as QPLayer
from implicit_layers.nn.simplex import Softmax as Softmax
