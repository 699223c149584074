"""Python identifiers for what the user named; nothing that a user names can become code."""

from __future__ import annotations

import builtins
import keyword
import re

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
    r"(op|step|adjoint|tangent|noise|validate|constant|draw|accumulate|adj|tan|new|grad)(_|$)"
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
