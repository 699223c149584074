"""How far two results are apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in the Euclidean norm of the whole tensor."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    expected = expected.detach().double()
    difference = (actual.detach().double() - expected).norm()
    scale = expected.norm()
    if scale == 0:
        return float(difference)
    return float(difference / scale)


def assert_close(
    actual: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    *,
    rtol: float = 1e-10,
) -> None:
    """Raise AssertionError, naming every entry that is off, unless all agree to ``rtol``.

    None agrees with None alone: a gradient that is missing is not a gradient that is zero.
    """
    assert set(actual) == set(expected), f"{sorted(actual)} against {sorted(expected)}"
    wrong = []
    for name, value in expected.items():
        found = actual[name]
        if (found is None) != (value is None):
            wrong.append(f"{name}: {_summary(found)}, expected {_summary(value)}")
        elif found is not None and value is not None:
            error = relative_error(found, value)
            if not error <= rtol:  # a NaN must fail
                wrong.append(f"{name}: relative error {error:.2e}")
    assert not wrong, f"not within {rtol:.0e}:\n  " + "\n  ".join(wrong)


def _summary(value: Tensor | None) -> str:
    return "None" if value is None else f"a tensor of norm {value.norm().item():.3g}"


def flattened(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Nested mappings of tensors and numbers as one mapping ``outer.inner`` to float64 tensor."""
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in flattened(value).items()}
        elif value is not None:
            flat[name] = torch.as_tensor(value).detach().double()
    return flat
