"""Batch normalisation apart from its running statistics, which change from step to step.

In training mode the op normalises by the batch alone, but it takes and returns running statistics
as well. Where its operands are the same in every step, so is what it computes of them::

    y, μ, r, m', v' = batch_norm(x, w, b, m, v)  -->  y, μ, r = batch_norm(x, w, b)
                                                      σ², μ = var_mean(x)
                                                      m' = (1 - momentum) · m + momentum · μ
                                                      v' = (1 - momentum) · v + momentum · σ²

The running statistics carry no derivative, as in PyTorch.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from unrollc.optimize.rewriting import Maker
from unrollc.step import StepGraph, build, copy

aten = torch.ops.aten

_WITH_STATISTICS = aten._native_batch_norm_legit_functional.default


def split_statistics(step: StepGraph, fixed: frozenset[str]) -> StepGraph:
    """The step with batch normalisation split where it reads what no step changes.

    Args:
        step: The step; it is left as it is.
        fixed: Names of inputs that no step changes.
    """
    if not any(_counts(node) for node in step.graph.nodes):
        return step
    result = copy(step)
    found = {node for node in result.placeholders if node.name in fixed}
    for node in list(result.graph.nodes):
        if node.op != "call_function":
            continue
        if _counts(node):
            read = [arg for arg in node.args[:3] if isinstance(arg, fx.Node)]
            if found.issuperset(read):
                found |= _split(result.graph, node)
                continue
        if found.issuperset(node.all_input_nodes):
            found.add(node)
    return build(result.graph, result.inputs, result.outputs, result.constants)


def _counts(node: fx.Node) -> bool:
    """Whether the op normalises by the batch, in the precision of its running statistics."""
    args: Any = node.args
    if node.target is not _WITH_STATISTICS or args[5] is not True:
        return False
    return bool(args[0].meta["val"].dtype == args[3].meta["val"].dtype)


def _split(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    """Split one op; returns what of it no step changes."""
    args: Any = node.args
    x, weight, bias, mean, variance, _, momentum, eps = args
    make = Maker(graph, node)
    normal = make(aten._native_batch_norm_legit.no_stats, x, weight, bias, True, momentum, eps)
    axes = [axis for axis in range(x.meta["val"].dim()) if axis != 1]
    moments = make(aten.var_mean.correction, x, axes)  # unbiased, as running variances are
    parts = [make(operator.getitem, normal, index) for index in range(3)]
    both = [make(operator.getitem, moments, index) for index in (1, 0)]
    seen = [make(aten.detach.default, each) for each in both]
    parts += [
        make(
            aten.add.Tensor,
            make(aten.mul.Tensor, old, 1 - momentum),
            make(aten.mul.Tensor, new, momentum),
        )
        for old, new in zip((mean, variance), seen, strict=True)
    ]
    for user in list(node.users):
        user.replace_all_uses_with(parts[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)
    return {normal, moments, *parts[:3], *both, *seen}
