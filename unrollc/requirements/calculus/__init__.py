"""The calculus of captured updates: expressions, derivatives, kinks and singular points."""
