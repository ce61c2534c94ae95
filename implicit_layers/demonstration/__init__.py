"""The demonstration behind `python -m implicit_layers`: two models on handwritten digits, each differentiated twice."""

from implicit_layers.demonstration.report import figure, table
from implicit_layers.demonstration.training import Result, Settings, run

__all__ = ["Result", "Settings", "figure", "run", "table"]
