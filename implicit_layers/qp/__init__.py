"""Quadratic programs as layers."""

from implicit_layers.qp.solve import solve_qp as solve_qp
