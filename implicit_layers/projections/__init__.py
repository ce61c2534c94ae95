"""Euclidean projections onto convex sets, differentiable in the point and in the parameters of the set."""

from implicit_layers.projections.doubly_stochastic import birkhoff as birkhoff
from implicit_layers.projections.isotone import isotonic as isotonic
from implicit_layers.projections.permutations import permutahedron as permutahedron
from implicit_layers.projections.sets import box as box
from implicit_layers.projections.sets import half_space as half_space
from implicit_layers.projections.sets import hyperplane as hyperplane
from implicit_layers.projections.sets import l2_ball as l2_ball
from implicit_layers.projections.simplices import capped_simplex as capped_simplex
from implicit_layers.projections.simplices import l1_ball as l1_ball
from implicit_layers.projections.simplices import simplex as simplex
