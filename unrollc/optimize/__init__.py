"""Optimisation: graph to graph, the function unchanged."""
