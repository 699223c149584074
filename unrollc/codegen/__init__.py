"""Code generation: pieces become one readable Python module."""
