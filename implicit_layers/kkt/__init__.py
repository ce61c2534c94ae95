"""KKT systems as pure functions: residual, Jacobian and its inverse by blocks, each beside its equation."""
