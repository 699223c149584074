"""Machine code for the functions of a generated program, and its cache on the disk."""
