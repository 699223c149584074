"""Captured updates for tests, and their derivations evaluated at points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

from docs import generate_derivatives as generator
from unrollc.requirements.calculus.derivation import Derivation
from unrollc.requirements.calculus.derive import derive

captured = generator.captured


def derived(optimizer: Any, *, steps: int = 3, which: int = -1, **settings: Any) -> Derivation:
    """The derivation of one of an optimizer's distinct steps."""
    (found,) = derive(captured(optimizer, steps=steps, **settings)[which])
    return found


def evaluated(derivation: Derivation, values: Mapping[str, float]) -> dict[Any, float]:
    """All names of a derivation as numbers.

    Args:
        derivation: The derivation.
        values: Its inputs by key.
    """
    known = {symbol: values[key] for key, symbol in derivation.inputs.items()}
    for definition in derivation.definitions:
        known[definition.symbol] = number(definition.value, known)
    return known


def number(expression: Any, known: Mapping[Any, float]) -> float:
    """An expression at a point."""
    return float(sympy.sympify(expression).subs(known))
