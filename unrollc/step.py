"""The intermediate representation: graphs over ATen ops whose inputs and outputs have roles.

A `StepGraph` is one inner step ``(θ, state, φ, batch, noise) -> (θ', state', loss)`` as a
`torch.fx` graph. The same class carries adjoints and the outer validation loss; what differs is
which roles stand among their inputs and outputs. Node metadata:

* ``node.meta["val"]``: a fake tensor with the value's shape, dtype, device and storage;
* ``node.meta["phase"]``: the `Phase` that the value belongs to;
* ``node.meta["source"]``: the user's line (`errors.Source`), or None;
* ``node.meta["removable"]``: of a root in the update, why a zero cotangent at its zero gives a zero
  derivative, where that is proved; ``node.meta["nonsingular"]``: why its argument is never zero.
"""

from __future__ import annotations

import enum
import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from unrollc.errors import Source

_LIBRARY = torch.library.Library("unrollc", "DEF")
_LIBRARY.define("attach(Tensor value, Tensor carrier) -> Tensor")
_LIBRARY.impl("attach", lambda value, carrier: value.clone(), "CompositeExplicitAutograd")

#: ``attach(value, carrier)`` is `value`, and its derivative is that of `carrier`. It carries the
#: derivative that a custom ``autograd.Function`` declares; no generated program contains it.
ATTACH = torch.ops.unrollc.attach.default


class Role(enum.Enum):
    """What a graph's input or output is to the meta-loop (GIMLI, §2)."""

    THETA = "theta"
    OPT_STATE = "opt_state"
    BUFFER = "buffer"
    AVERAGE = "average"
    HYPER = "hyper"
    CONTEXT = "context"
    INVARIANT = "invariant"
    BATCH = "batch"
    NOISE = "noise"
    CONSTANT = "constant"
    LOSS = "loss"
    GRADIENT = "gradient"
    COTANGENT = "cotangent"
    RESIDUAL = "residual"
    TANGENT = "tangent"


#: Roles of what one step hands to the next.
STATE_ROLES = (Role.THETA, Role.OPT_STATE, Role.BUFFER, Role.AVERAGE)

#: Roles of what one step hands to the next in forward mode: the state's tangents travel with it.
CARRIED = (*STATE_ROLES, Role.TANGENT)

#: Roles of state whose start may be a meta-parameter: θ_0, and what the optimizer remembers.
STARTS = (Role.THETA, Role.OPT_STATE)


class Phase(enum.Enum):
    """The part of a step that a value belongs to."""

    FORWARD = "forward"
    LOSS = "loss"
    GRADIENT = "gradient"
    UPDATE = "update"
    ADJOINT = "adjoint"
    TANGENT = "tangent"


#: Phases of what differentiation computes.
DERIVED = (Phase.ADJOINT, Phase.TANGENT)


@dataclass(frozen=True)
class Noise:
    """A random input: drawn by the runtime, so that a recomputed step sees the same values.

    Attributes:
        distribution: "bernoulli", "uniform", "normal", "exponential", "randint" or "randperm".
        parameters: The distribution's numbers, e.g. ``(p,)`` or ``(low, high)``.
        shape, dtype, device: Of the tensor that is drawn.
    """

    distribution: str
    parameters: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Value:
    """An input or output of a graph.

    Attributes:
        role: What it is to the meta-loop.
        label: How the user knows it: ``conv1.weight``, ``param_groups[0]["lr"]``.
        name: The Python identifier that graphs and generated code use.
        of: For cotangents, tangents and gradients, the role of the value they belong to.
        noise: The distribution, for `Role.NOISE`.
        direction: For tangents, the number of the direction in which the value moves.
    """

    role: Role
    label: str
    name: str
    of: Role | None = None
    noise: Noise | None = None
    direction: int | None = None

    @property
    def key(self) -> tuple[Role, str, Role | None, int | None]:
        """Identity of the value across graphs."""
        return (self.role, self.label, self.of, self.direction)


@dataclass(frozen=True)
class StepGraph:
    """A pure graph over ATen ops with typed inputs and outputs.

    Attributes:
        graph: Placeholders in the order of `inputs`, a flat output tuple in the order of
            `outputs`. An output may be None: a structural zero.
        inputs: One `Value` a placeholder.
        outputs: One `Value` an output.
        constants: Tensors for the inputs of `Role.CONSTANT`, by name.
    """

    graph: fx.Graph
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: dict[str, torch.Tensor]

    @functools.cached_property
    def module(self) -> fx.GraphModule:
        """The graph as a callable, made when it is first asked for."""
        return fx.GraphModule(torch.nn.Module(), self.graph)

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def results(self) -> tuple[fx.Node | None, ...]:
        """The nodes that are returned, in the order of `outputs`."""
        return tuple(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def inputs_with(self, *roles: Role) -> list[tuple[Value, fx.Node]]:
        pairs = zip(self.inputs, self.placeholders, strict=True)
        return [(value, node) for value, node in pairs if value.role in roles]

    def outputs_with(self, *roles: Role) -> list[tuple[Value, fx.Node | None]]:
        pairs = zip(self.outputs, self.results, strict=True)
        return [(value, node) for value, node in pairs if value.role in roles]

    def __str__(self) -> str:
        return print_graph(self)


def build(
    graph: fx.Graph,
    inputs: tuple[Value, ...],
    outputs: tuple[Value, ...],
    constants: dict[str, torch.Tensor],
) -> StepGraph:
    """A verified `StepGraph` over `graph`, which must already have its output node."""
    graph.lint()
    step = StepGraph(graph, inputs, outputs, constants)
    verify(step)
    return step


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A new graph input called exactly `name` (`fx.Graph.placeholder` would change its case)."""
    return graph.create_node("placeholder", name, name=name)


def copy(step: StepGraph) -> StepGraph:
    """A copy whose graph can be rewritten without touching `step`."""
    graph = fx.Graph()
    output = graph.graph_copy(step.graph, {})
    graph.output(output)
    return StepGraph(graph, step.inputs, step.outputs, step.constants)


def verify(step: StepGraph) -> None:
    """Check what every stage may rely on; a failure is our own mistake, hence assertions.

    Placeholders and outputs agree with their types, every op is a functional ATen op (or
    `ATTACH`), and every tensor node has its metadata.
    """
    assert len(step.placeholders) == len(step.inputs), (step.placeholders, step.inputs)
    assert len(step.results) == len(step.outputs), (step.results, step.outputs)
    for value, node in zip(step.inputs, step.placeholders, strict=True):
        assert node.name == value.name, f"placeholder {node.name} is typed as {value}"
        assert (value.role is Role.CONSTANT) == (node.name in step.constants), value
    for node in step.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        assert node.op == "call_function", f"{node.op} {node.format_node()}"
        assert node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload), (
            node.format_node()
        )
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, f"mutation in {node.format_node()}"
        assert "phase" in node.meta and "val" in node.meta, f"no metadata on {node.format_node()}"


def read_besides_gradients(step: StepGraph) -> list[fx.Node]:
    """What the update reads of the inner step's forward, loss and gradient besides gradients.

    Mixed mode cuts the step there: Oᵀ·B is the cotangent of what crosses the cut.
    """
    gradients = {node for _, node in step.outputs_with(Role.GRADIENT)}
    inner = (Phase.FORWARD, Phase.LOSS, Phase.GRADIENT)
    found: dict[fx.Node, None] = {}
    for node in step.graph.nodes:
        if node.op == "call_function" and node.meta["phase"] is Phase.UPDATE:
            for source in node.all_input_nodes:
                crossing = source.op == "call_function" and source.meta["phase"] in inner
                if crossing and source not in gradients:
                    found[source] = None
    return list(found)


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors that a node stands for (several, for an op with several results)."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [item for item in value if isinstance(item, torch.Tensor)]
    return []


_SHORT_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def shape_text(tensor: torch.Tensor) -> str:
    """``f32[8, 32]``"""
    dtype = _SHORT_DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return f"{dtype}[{', '.join(str(size) for size in tensor.shape)}]"


def print_graph(step: StepGraph) -> str:
    """The graph as text, one value a line, grouped by phase."""
    lines = []
    for value, node in zip(step.inputs, step.placeholders, strict=True):
        shapes = ", ".join(shape_text(t) for t in tensors_of(node))
        lines.append(f"{node.name}: {shapes}  {value.role.value} {value.label}")
    phase = None
    for node in step.graph.nodes:
        if node.op != "call_function":
            continue
        if node.meta["phase"] is not phase:
            phase = node.meta["phase"]
            lines.append(f"-- {phase.value}")
        source: Source | None = node.meta.get("source")
        shapes = ", ".join(shape_text(t) for t in tensors_of(node))
        where = f"  {source.short}" if source else ""
        lines.append(f"{node.name} = {node.target}{node.args}  # {shapes}{where}")
    for value, result in zip(step.outputs, step.results, strict=True):
        lines.append(f"return {value.role.value} {value.label} = {result}")
    return "\n".join(lines)


def iterate_calls(step: StepGraph) -> Iterator[fx.Node]:
    """The op nodes in order of execution, tuple projections left out."""
    for node in step.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            yield node
