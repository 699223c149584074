"""Forward mode over a captured graph, one node at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.utils import _pytree as pytree

from unrollc.capture.nests import is_continuous
from unrollc.capture.record import Recorder
from unrollc.differentiate.replay import EQUIVALENTS, is_projection, zero_where_zero
from unrollc.step import ATTACH, Phase

_ZEROS = ("zeros", "zeros_like", "new_zeros", "_efficientzerotensor")


class NoForwardFormulaError(Exception):
    """An op has no forward-mode derivative, decomposed or not."""


class Pushforward:
    """Tangents of the nodes of a graph in one direction.

    A node none of whose inputs has a tangent has none; nothing is computed for it. What a
    selection drops needs no guard here (`guarded`): its tangent is dropped with it.

    Attributes:
        recorder: Where the derivatives are recorded.
        values: What each node stands for; the primal graph has been replayed already.
        phase: The phase of the recorded ops.
        tangents: Tangents by node; a missing one is a structural zero.
    """

    def __init__(
        self,
        recorder: Recorder,
        values: Mapping[fx.Node, Any],
        phase: Phase,
        tangents: Mapping[fx.Node, Tensor],
    ) -> None:
        self.recorder = recorder
        self.values = values
        self.phase = phase
        self.tangents: dict[fx.Node, Any] = dict(tangents)

    def run(self, nodes: Iterable[fx.Node]) -> None:
        """Push the tangents through `nodes`, in order.

        Raises:
            NoForwardFormulaError: If an op on the way has no forward-mode derivative.
        """
        for node in nodes:
            self.recorder.origin, self.recorder.phase = node, self.phase
            if is_projection(node):
                self._project(node)
            elif node.target is ATTACH:
                self._keep(node, self.tangents.get(node.args[1]))  # type: ignore[arg-type]
            elif any(source in self.tangents for source in node.all_input_nodes):
                self._push(node)

    def _keep(self, node: fx.Node, tangent: Any) -> None:
        if tangent is not None:
            self.tangents[node] = tangent

    def _project(self, node: fx.Node) -> None:
        source, index = node.args
        if source in self.tangents:
            self._keep(node, self.tangents[source][index])  # type: ignore[index]

    def _push(self, node: fx.Node) -> None:
        sources, _ = pytree.tree_flatten((node.args, node.kwargs), is_leaf=_is_node)
        operands = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        leaves, spec = pytree.tree_flatten(operands)
        moving = [i for i, s in enumerate(sources) if isinstance(s, fx.Node) and s in self.tangents]
        primals = tuple(leaves[i] for i in moving)
        directions = tuple(self.tangents[sources[i]].to(leaves[i].dtype) for i in moving)
        shape: list[bool] = []

        def function(target: Any) -> Any:
            def run(*moved: Tensor) -> Any:
                filled = list(leaves)
                for i, tensor in zip(moving, moved, strict=True):
                    filled[i] = tensor
                new_args, new_kwargs = pytree.tree_unflatten(filled, spec)
                result = target(*new_args, **new_kwargs)
                if isinstance(result, Tensor):
                    return result
                shape[:] = [isinstance(item, Tensor) for item in result]
                return tuple(item for item in result if isinstance(item, Tensor))

            return run

        value, tangent = self._jvp(node, function, primals, directions)
        if isinstance(value, tuple):
            kept = [self._nonzero(v, t) for v, t in zip(value, tangent, strict=True)]
            self.tangents[node] = _spread(kept, shape)
            return
        if node.meta.get("removable"):  # a root: its one operand is what moves
            tangent = zero_where_zero(tangent, directions[0])
        self._keep(node, self._nonzero(value, tangent))

    def _jvp(self, node: fx.Node, function: Any, primals: Any, directions: Any) -> tuple[Any, Any]:
        candidates = [EQUIVALENTS.get(node.target, node.target)]
        if node.target in decomposition_table:
            candidates.append(decomposition_table[node.target])
        for candidate in candidates:
            try:
                pushed: tuple[Any, Any] = torch.func.jvp(  # type: ignore[assignment]
                    function(candidate), primals, directions
                )
                return pushed
            except (NotImplementedError, RuntimeError) as error:
                if "forward" not in str(error).lower() and "derivative" not in str(error).lower():
                    raise
        raise NoForwardFormulaError(f"{node.target} has no forward-mode derivative")

    def _nonzero(self, value: Any, tangent: Any) -> Tensor | None:
        if not is_continuous(value):
            return None
        node = self.recorder.node_of(tangent)
        assert node is not None
        name = getattr(getattr(node.target, "_schema", None), "name", "").split("::")[-1]
        return None if name in _ZEROS else tangent


def _spread(items: Sequence[Any], present: list[bool]) -> list[Any]:
    """`items` at the positions that hold a tensor, None elsewhere."""
    remaining = iter(items)
    return [next(remaining) if here else None for here in present]


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)
