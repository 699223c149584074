"""Differentiation: a step graph becomes its adjoint (vector-Jacobian product)."""
