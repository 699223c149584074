"""The recorder: a dispatch mode that writes every functional ATen op into an `fx.Graph`.

It stands below PyTorch's functionalization (in-place ops arrive as pure ones) and below
`torch.func` and autograd (derivatives arrive as ordinary ops), and works on fake tensors. Each
recorded node knows its phase and the user's line; an op of a backward pass inherits the line of
the forward op that it differentiates, found by autograd's sequence numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor, disable_functional_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from unrollc.capture import refusals
from unrollc.capture.faking import fake_like, faked
from unrollc.capture.functional import RecordedFunctionalization, from_functional
from unrollc.capture.home import at_home
from unrollc.capture.nests import is_continuous, map_tensors, tensors_in
from unrollc.capture.noise import as_noise
from unrollc.capture.reading import CONCRETE_NUMEL, Guard, follow, read_number
from unrollc.capture.source import SourceFinder
from unrollc.capture.strided import scatter_strided
from unrollc.errors import Source
from unrollc.step import Noise, Phase, placeholder

aten = torch.ops.aten


def _storage_numel(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.itemsize


#: Questions about tensors that need no fake kernel; autograd and forward mode ask them for each
#: op, which makes two thirds of what reaches the recorder.
_FACTS: dict[Any, Callable[..., Any]] = {
    torch.ops.prim.device.default: lambda x: getattr(x, "fake_device", None) or x.device,
    aten.is_same_size.default: lambda x, y: x.shape == y.shape,
    aten._has_same_storage_numel.default: lambda x, y: _storage_numel(x) == _storage_numel(y),
}


class Recorder(TorchDispatchMode):
    """Writes ops on fake tensors into `graph`.

    Attributes:
        graph: What has been recorded.
        phase: The phase that new nodes belong to.
        lifted: Tensors that the user's code brought in from outside (closures), with their
            placeholder nodes.
        constants: Small tensors that the code made from numbers, with their placeholders.
        noise: Random inputs, with their placeholders.
        concrete: Real values of nodes that depend on known scalars alone.
        readable: Real values of inputs that only shapes may depend on (`values`).
        guards: Where Python read such a value.
        fast: Labels of the user's parameters that are fast weights, by id; code that reads one
            from outside would see a stale value.
        stale: Tensors that an earlier step left in attributes of modules, by id, with their names.
        sources: Finds the user's line.
        compiling: Whether code that asks is told that it is being compiled (`model.captured`).
        nonzero: Labels of hyperparameters for which ``x != 0`` is answered with yes.
        zero_tests: Hyperparameters equal to zero that the code compared with zero.
        assumed: Answers given for `nonzero`; the graph is valid under the others as well.
        home: The device of the fast weights.
        networks_running: How many forwards of an optimizer's networks are on the stack.
    """

    #: Whether values of known scalars are computed along, for Python to read.
    follows = True

    def __init__(self, sources: SourceFinder, fake_mode: FakeTensorMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.phase = Phase.FORWARD
        self.fake_mode = fake_mode or FakeTensorMode()
        self.lifted: list[tuple[Tensor, fx.Node]] = []
        self.constants: list[tuple[Tensor, fx.Node]] = []
        self.noise: list[tuple[Noise, fx.Node]] = []
        self.concrete: dict[fx.Node, Tensor] = {}
        self.readable: dict[fx.Node, Tensor] = {}
        self.guards: list[Guard] = []
        self.nonzero: frozenset[str] = frozenset()
        self.fast: dict[int, str] = {}
        self._fast_memory: dict[int | None, str] = {}
        self.stale: dict[int, str] = {}
        self.compiling = False
        self.zero_tests: list[tuple[str, Source | None]] = []
        self.assumed: list[Guard] = []
        self.origin: fx.Node | None = None
        self.declaring = False
        self.networks_running = 0
        self.sources = sources
        self.home = torch.device("cpu")
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []
        self._lines: dict[int, Source | None] = {}
        self._stopped: dict[fx.Node, fx.Node | None] = {}
        self._last_placeholder: fx.Node | None = None

    # -- inputs and outputs ---------------------------------------------------------------

    def input(self, name: str, example: Tensor, concrete: Tensor | None = None) -> Tensor:
        """A new graph input like `example`, in storage of its own."""
        fake = fake_like(self.fake_mode, example)
        node = self._placeholder(name, fake)
        if concrete is not None and concrete.numel() <= CONCRETE_NUMEL:
            self.concrete[node] = concrete.detach().cpu()
        return fake

    def watch(self, fast: Mapping[str, Tensor]) -> None:
        """Refuse code that reads one of these tensors, or their memory, from outside."""
        self.fast = {id(tensor): label for label, tensor in fast.items()}
        self._fast_memory = {memory_of(tensor): label for label, tensor in fast.items()}
        self._fast_memory.pop(None, None)

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """The node that stands for `tensor`, whatever wrappers it wears."""
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        if isinstance(tensor, FunctionalTensor):
            with self._beneath_functionalization():
                tensor = from_functional(tensor)
        return self._nodes.get(id(tensor))

    @contextlib.contextmanager
    def _beneath_functionalization(self) -> Iterator[None]:
        """Where a view of what was written to is made anew, this is recorded too."""
        key = torch._C._TorchDispatchModeKey.FUNCTIONAL
        running = torch._C._get_dispatch_mode(key) is not None
        with disable_functional_mode() if running else contextlib.nullcontext(), self:
            yield

    def is_known(self, tensor: Tensor) -> bool:
        """Whether the value of `tensor` depends on known scalars alone."""
        return self.node_of(tensor) in self.concrete

    def run(self, body: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        """Record `body(*inputs)`; its tensors come back as fake ones (see `node_of`)."""
        mode = RecordedFunctionalization(self)
        excluded = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            with mode:
                results = body(*(FunctionalTensor.to_functional(tensor) for tensor in inputs))
            with self._beneath_functionalization():
                return pytree.tree_map_only(FunctionalTensor, from_functional, results)

    def _placeholder(self, name: str, fake: Tensor) -> fx.Node:
        first = next(iter(self.graph.nodes), None)
        if self._last_placeholder is not None:
            with self.graph.inserting_after(self._last_placeholder):
                node = placeholder(self.graph, name)
        elif first is not None:
            with self.graph.inserting_before(first):
                node = placeholder(self.graph, name)
        else:
            node = placeholder(self.graph, name)
        self._last_placeholder = node
        self._remember(fake, node)
        return node

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        node.meta.setdefault("val", tensor)

    # -- ops ------------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.record(func, types, args, kwargs or {})

    def record(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op on fake tensors and write it down (PyTorch wraps `__torch_dispatch__`)."""
        key = torch._C._TorchDispatchModeKey.FUNCTIONAL
        if torch._C._get_dispatch_mode(key) is not None:
            return func(*args, **kwargs)
        if (fact := _FACTS.get(func)) is not None:
            return fact(*args)
        if func is aten._local_scalar_dense.default:
            return read_number(self, args[0])
        if func in (aten.lift_fresh.default, aten.lift_fresh_copy.default):
            return self._constant(args[0])
        args, kwargs = map_tensors(self._known, (args, kwargs))
        if func is aten.as_strided_scatter.default:
            with self:
                return scatter_strided(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self._draw(func, args, kwargs)
        result = self._faked(func, args, kwargs)
        if not isinstance(result, Tensor) and not tensors_in(result):
            return result
        self._write(func, args, kwargs, result)
        return result

    def _faked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return faked(self.fake_mode, func, args, kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise refusals.shape_of_data(func, self._line()) from error

    def _write(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> fx.Node:
        source = self._line()
        stop = self.stops_gradient()
        if not stop and (same := self._transparent(func, args, result)) is not None:
            self._remember(result, same)
            return same

        def reference(tensor: Tensor) -> fx.Node:
            node = self._nodes[id(tensor)]
            return node if stop else self.after_stop(node)

        node_args, node_kwargs = map_tensors(reference, (args, kwargs))
        node = self.graph.call_function(func, node_args, node_kwargs)
        node.meta.update(phase=self.phase, source=source)
        node.meta["val"] = result
        if func is aten.zeros_like.default and self.phase is Phase.GRADIENT:
            node.meta["filled"] = torch._C._current_autograd_node() is None
        if self.follows:
            follow(self, node, func, args, kwargs)
        made = [node]
        if isinstance(result, Tensor):
            self._remember(result, node)
        else:
            for index, item in enumerate(result):
                if isinstance(item, Tensor):
                    part = self.graph.call_function(operator.getitem, (node, index))
                    part.meta.update(phase=self.phase, source=source)
                    self._remember(item, part)
                    made.append(part)
                    if node in self.concrete:
                        self.concrete[part] = self.concrete[node][index]
        if stop:
            self._stopped.update(dict.fromkeys(n for n in made if _may_move(n)))
        return node

    def _transparent(self, func: Any, args: tuple[Any, ...], result: Any) -> fx.Node | None:
        """The node whose value an op hands on: ``copy`` its source, an optimizer's ``detach``
        its argument (there it means "do not track", and the update is differentiated later)."""
        untracked = self.phase is Phase.UPDATE and not self.networks_running
        if func is aten.detach.default and untracked and self.origin is None:
            return self._nodes[id(args[0])]
        if func is aten.copy.default:
            source = args[1]
            same = (source.shape, source.dtype) == (result.shape, result.dtype)
            return self._nodes[id(source)] if same else None
        return None

    def _known(self, tensor: Tensor) -> Tensor:
        """`tensor` itself where it is ours, its fake stand-in where the user brought it in."""
        if id(tensor) in self._nodes:
            return tensor
        for real, node in self.lifted:
            if real is tensor:
                return node.meta["val"]  # type: ignore[no-any-return]
        if isinstance(tensor, FakeTensor):
            assert self.origin is None, "a fake tensor of unknown origin reached the recorder"
            raise refusals.of_another_step(self._line())
        label = self.fast.get(id(tensor))
        if label is None and self._fast_memory:
            label = self._fast_memory.get(memory_of(tensor))
        if label is not None:
            raise refusals.behind_the_back(label, self._line())
        fake = self.input(f"lifted_{len(self.lifted)}", at_home(tensor, self.home))
        node = self._nodes[id(fake)]
        self.lifted.append((tensor, node))
        return fake

    def _constant(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._nodes:
            return tensor
        value = tensor.detach().clone()
        taken = {node.name for node in self.graph.nodes if node.op == "placeholder"}
        name = next(n for i in itertools.count() if (n := f"constant_{i}") not in taken)
        fake = self.input(name, value, concrete=value)
        self.constants.append((value, self._nodes[id(fake)]))
        return fake

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.fake_mode:
            like = func(*args, **kwargs)
        found = as_noise(func, args, kwargs, like)
        if found is None:
            raise refusals.unknown_noise(func, self._line())
        noise, finish = found
        example = torch.empty(noise.shape, dtype=noise.dtype, device="meta")
        with self.fake_mode:
            fake = torch.empty_strided(
                example.shape, example.stride(), dtype=noise.dtype, device=noise.device
            )
        node = self._placeholder(f"noise_{len(self.noise)}", fake)
        self.noise.append((noise, node))
        with self:
            return finish(fake)

    # -- lines and stopped gradients ----------------------------------------------------------

    def _line(self) -> Source | None:
        running = torch._C._current_autograd_node()
        if running is not None:
            return self._lines.get(running._sequence_nr())
        if self.origin is not None:
            source = self.origin.meta.get("source")
        else:
            source = self.sources.here(optimizer=self.phase is Phase.UPDATE)
        number = torch.autograd._get_sequence_nr()
        self._lines[number - 1] = source
        # Where a closure tensor requires grad, autograd below torch.func has made a node as well.
        self._lines.setdefault(number - 2, source)
        return source

    def in_user_code(self) -> bool:
        """Whether the user's forward or loss is running, and not a replay of it."""
        return self.phase in (Phase.FORWARD, Phase.LOSS) and self.origin is None

    def stops_gradient(self) -> bool:
        """Whether the user's ``no_grad`` is on in model, loss or a network: a stop-gradient."""
        authored = self.phase in (Phase.FORWARD, Phase.LOSS) or self.networks_running > 0
        return (
            authored and self.origin is None and not self.declaring and not torch.is_grad_enabled()
        )

    def after_stop(self, node: fx.Node) -> fx.Node:
        """`node`, behind a ``detach`` of its line where it was computed under ``no_grad``."""
        if node not in self._stopped:
            return node
        stop = self._stopped[node]
        if stop is None:
            stop = self.graph.call_function(aten.detach.default, (node,))
            stop.meta.update(phase=self.phase, source=node.meta.get("source"), val=node.meta["val"])
            self._stopped[node] = stop
        return stop

    @contextlib.contextmanager
    def declared(self) -> Iterator[None]:
        """Ops inside are part of a derivative that the user declares, not stopped ones."""
        before, self.declaring = self.declaring, True
        try:
            yield
        finally:
            self.declaring = before


def memory_of(tensor: Tensor) -> int | None:
    """What tensors that share their memory have in common; None where there is no memory."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    traced = wrapped or isinstance(tensor, FakeTensor | FunctionalTensor)
    if traced or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    return tensor.untyped_storage().data_ptr() or None


def _may_move(node: fx.Node) -> bool:
    """Whether a value has a derivative that could be stopped."""
    return any(is_continuous(tensor) for tensor in tensors_in(node.meta["val"]))
