"""Layers defined by a condition: the output solves a system, the gradient comes from the implicit function theorem."""

__version__ = "0.1.0"

from implicit_layers import nn as nn
from implicit_layers.simplex import softmax as softmax
