"""What passes that make ops have in common."""

import torch

from tests.plan.graphs import Sketch
from unrollc.optimize.rewriting import sort

aten = torch.ops.aten


def test_ops_that_stand_too_early_follow_their_operands() -> None:
    """However many wait for one another: deep networks have thousands in a row."""
    sketch = Sketch()
    x = sketch.input("x", 2)
    chain = [sketch.call(aten.neg.default, x)]
    for _ in range(3000):
        chain.append(sketch.call(aten.tanh.default, chain[-1]))
    apart = sketch.call(aten.sin.default, x)
    step = sketch.returning(chain[-1], apart)
    output = step.graph.output_node()
    output.prepend(chain[0])  # behind all that read it
    sort(step.graph)
    step.graph.lint()
    ops = [node for node in step.graph.nodes if node.op == "call_function"]
    assert ops == [apart, *chain]
