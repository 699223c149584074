"""Expressions as one line of text and as LaTeX.

Importing this module imports sympy.
"""

# Methods are called after the sympy classes that they print.
# ruff: noqa: N802

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
from sympy.printing.latex import LatexPrinter
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from unrollc.requirements.calculus.notation import Name

_SIGNS = {"==": "=", "!=": "≠", "<=": "≤", ">=": "≥"}


def _decimal(value: Any) -> str | None:
    """A fraction as the short decimal that it is, or None."""
    if value.q < 10:
        return None
    short = f"{float(value):.12g}"
    return short if sympy.Rational(short) == value else None


class _Text(StrPrinter):  # type: ignore[misc]
    def _print_Abs(self, expr: Any) -> str:
        return f"|{self._print(expr.args[0])}|"

    def _print_Max(self, expr: Any) -> str:
        return f"max({self.stringify(expr.args, ', ')})"

    def _print_Min(self, expr: Any) -> str:
        return f"min({self.stringify(expr.args, ', ')})"

    def _print_Piecewise(self, expr: Any) -> str:
        cases = [
            self._print(value)
            if condition == sympy.true
            else f"{self._print(value)} if {self._print(condition)}"
            for value, condition in expr.args
        ]
        return f"({', else '.join(cases)})"

    def _print_Relational(self, expr: Any) -> str:
        sign = _SIGNS.get(expr.rel_op, expr.rel_op)
        return f"{self._print(expr.lhs)} {sign} {self._print(expr.rhs)}"

    def _print_Rational(self, expr: Any) -> str:
        return _decimal(expr) or str(super()._print_Rational(expr))

    def _print_Pow(self, expr: Any, rational: bool = False) -> str:
        if expr.exp == sympy.Rational(1, 2):
            return f"√({self._print(expr.base)})"
        if expr.exp.is_number and expr.exp.is_negative:
            below = self.parenthesize(expr.base**-expr.exp, PRECEDENCE["Mul"], strict=False)
            return f"1/{below}"
        base = self.parenthesize(expr.base, PRECEDENCE["Pow"])
        if expr.base.is_Rational:
            base = self._print(expr.base)
        return f"{base}^{self.parenthesize(expr.exp, PRECEDENCE['Pow'])}"


class _Latex(LatexPrinter):  # type: ignore[misc]
    def _print_Rational(self, expr: Any) -> str:
        return _decimal(expr) or str(super()._print_Rational(expr))


def text(expression: Any) -> str:
    """``θ - η*m′/(√(v′) + ε)``"""
    return str(_Text().doprint(expression))


def latex(expression: Any, names: Mapping[Any, Name]) -> str:
    """An expression in LaTeX, with the letters of `names`."""
    letters = {symbol: name.latex for symbol, name in names.items()}
    return str(_Latex({"symbol_names": letters}).doprint(expression))
