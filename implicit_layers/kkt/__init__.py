"""KKT systems as pure functions: residual, Jacobian, adjoint solve, gradients of the data."""
