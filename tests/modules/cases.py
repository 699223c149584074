"""The table of modules: every public class of `torch.nn`, in one or several settings."""

from __future__ import annotations

from torch import nn

from tests.modules import layers, losses, pointwise, spatial

CASES = [*pointwise.CASES, *spatial.CASES, *layers.CASES, *losses.CASES]

#: Classes without a case, and why.
WITHOUT = {
    "Container": "deprecated, and nothing but another name of Module",
    "RNNBase": "the base of RNN, LSTM and GRU, without a forward of its own",
    "RNNCellBase": "the base of RNNCell, LSTMCell and GRUCell, without a forward of its own",
}


def public_modules() -> set[str]:
    """The names of the classes of `torch.nn` that are modules."""
    return {
        name
        for name, value in vars(nn).items()
        if not name.startswith("_") and isinstance(value, type) and issubclass(value, nn.Module)
    }
