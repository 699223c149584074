"""Recording derivatives without functionalization.

A replayed graph is pure, so only the temporaries of PyTorch's own derivative formulas are changed
in place. Turning these ops into pure ones here takes a third less time than functionalization does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from unrollc.capture.faking import without_history
from unrollc.capture.functional import pure_form
from unrollc.capture.nests import map_tensors
from unrollc.capture.record import Recorder
from unrollc.capture.source import SourceFinder


class _NotPureError(Exception):
    """Functionalization is needed after all."""


class PureRecorder(Recorder):
    """A recorder for pure code; falls back on functionalization where that is not enough.

    It is not where a tensor that others are views of is written to.
    """

    follows = False  # no code reads numbers from a derivative

    def __init__(self, sources: SourceFinder) -> None:
        super().__init__(sources)
        self._sharing: Counter[int] = Counter()

    def run(self, body: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        """Record `body(*inputs)`; its tensors come back as fake ones (see `node_of`)."""
        before = set(self.graph.nodes)
        try:
            with self:
                results = body(*inputs)
        except (_NotPureError, RuntimeError):
            # Besides views that are written to: where PyTorch infers the shape of a structural zero
            # on the meta device, it may mix devices. A real error comes back from the second run.
            self._rewind(before)
            return super().run(body, [tensor.detach_() for tensor in inputs])
        for node in self.graph.nodes:
            node.meta["val"] = map_tensors(without_history, node.meta["val"])
        return results

    def record(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = torch._C._TorchDispatchModeKey.FUNCTIONAL
        if not func._schema.is_mutable or torch._C._get_dispatch_mode(key) is not None:
            return super().record(func, types, args, kwargs)
        pure = None if torch.Tag.inplace_view in func.tags else pure_form(func)
        target = args[0]
        if pure is None or self._sharing[_storage(target)] > 1:
            raise _NotPureError(str(func))
        result = super().record(pure, types, args, kwargs)
        self._nodes[id(target)] = self._nodes[id(result)]
        return target

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        super()._remember(tensor, node)
        self._sharing[_storage(tensor)] += 1

    def _known(self, tensor: Tensor) -> Tensor:
        """A real tensor is none of the user's here: PyTorch's formulas make structural zeros
        beneath the dispatcher, as the tangent of the constant weights of a normalisation."""
        if id(tensor) in self._nodes or isinstance(tensor, FakeTensor):
            return super()._known(tensor)
        if tensor.device.type == "meta":
            raise _NotPureError("a zero without a device")
        return self._constant(tensor)

    def _rewind(self, kept: set[fx.Node]) -> None:
        """Forget what was recorded after `kept`."""
        for node in reversed(list(self.graph.nodes)):
            if node not in kept:
                self.graph.erase_node(node)
        self._nodes = {key: node for key, node in self._nodes.items() if node in kept}
        self.constants = [(t, node) for t, node in self.constants if node in kept]
        self.lifted = [(t, node) for t, node in self.lifted if node in kept]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
