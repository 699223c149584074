"""Independent ways to compute what the compiler computes. Nothing here imports ``unrollc``."""
