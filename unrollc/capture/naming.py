"""Python identifiers for what the user named; nothing that a user names can become code."""

from __future__ import annotations

import builtins
import keyword
import operator
import re
from typing import Any

from torch import fx

#: Names that generated code uses itself.
_RESERVED = frozenset(
    [
        "torch",
        "math",
        "self",
        "inputs",
        "state",
        "kept",
        "losses",
        "loss",
        "noise",
        "seed",
        "cotangents",
        "tangents",
        "totals",
        "j",
        "gradients",
        "device",
        "inf",
        "nan",
        "NoneType",
        "fx_pytree",
        "pytree",
    ]
)
_RESERVED_PREFIX = re.compile(
    r"(op|step|adjoint|tangent|noise|validate|prologue|epilogue|constant|draw|accumulate|adj|tan|new"
    r"|grad|fixed)(_|$)"
)


def identifier(label: str) -> str:
    """A readable identifier made of a label, e.g. ``fc_weight_exp_avg``."""
    text = label
    if match := re.fullmatch(r"param_groups\[(\d+)\](.*)", label):
        text = f"{match[2]}_g{match[1]}"
    elif match := re.fullmatch(r'state\["(.*?)"\](.*)', label):
        text = match[1] + "_" + match[2]
    text = re.sub(r"[^0-9a-zA-Z]+", "_", text).strip("_") or "value"
    if text[0].isdigit():
        text = "p_" + text
    if _RESERVED_PREFIX.match(text):
        text = "p_" + text
    if keyword.iskeyword(text) or text in _RESERVED or hasattr(builtins, text):
        text += "_"
    return text


def origin_of(node: fx.Node) -> str:
    """The module and the op that made a value: ``body_3_tanh``."""
    origin: Any = node
    suffix = ""
    if node.target is operator.getitem:
        origin, index = node.args
        suffix = f"_{index}" if index else ""
    source = origin.meta.get("source")
    module = identifier(source.module) if source is not None and source.module else ""
    op = op_name(origin.target).lstrip("_")
    return "_".join(part for part in (module, op) if part) + suffix


def op_name(target: Any) -> str:
    """``mm`` for ``aten.mm.default``."""
    return str(target._schema.name.split("::")[-1])


class Names:
    """One identifier a label, the same at every request and different from all others."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()

    def __call__(self, label: str) -> str:
        if label not in self._names:
            base = name = identifier(label)
            number = 1
            while name in self._taken:
                number += 1
                name = f"{base}_v{number}"
            self._taken.add(name)
            self._names[label] = name
        return self._names[label]
