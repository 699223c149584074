"""Runtime: lowering with a cache, the autograd bridge, and what a call returns."""
