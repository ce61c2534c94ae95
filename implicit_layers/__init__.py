"""Layers defined by a condition: the output solves a system, the gradient comes from the implicit function theorem."""

__version__ = "0.1.0"
