"""Proof that the inner gradient's Jacobian is symmetric, which mixed mode needs.

The Jacobian of G = ∇ℓ is the Hessian, hence symmetric, if G is the gradient of the scalar that
the forward and loss phases compute. Two things are checked on the graph:

1. every forward and loss op is one whose PyTorch derivative is the derivative of its value
   (`EXACT_OPS`; a stop-gradient, an embedding with ``padding_idx`` or a declared derivative is
   not), and
2. the gradient phase is, node for node, what differentiating these ops yields (a hook or a
   custom ``autograd.Function`` changes it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from unrollc.differentiate.replay import Replay, calls, is_projection, start
from unrollc.step import Phase, Role, StepGraph

aten = torch.ops.aten

_EXACT = """
abs acos acosh add addbmm addcdiv addcmul addmm addmv addr alias amax amin asin asinh atan
atan2 atanh baddbmm bmm ceil celu clamp clamp_max clamp_min clone cos cosh deg2rad div dot elu
erf erfc erfinv exp exp2 expm1 floor fmod frac gelu glu hardsigmoid hardswish hardtanh
huber_loss hypot leaky_relu lerp lgamma log log10 log1p log2 log_sigmoid_forward logaddexp
logaddexp2 logit logsumexp maximum minimum mish mm mul mv neg outer pow prelu _prelu_kernel
reciprocal relu relu6 remainder round rrelu_with_noise_functional rsqrt rsub selu sgn sigmoid
sign silu sin sinc sinh smooth_l1_loss softplus softshrink hardshrink sqrt square sub tan tanh
threshold trunc where xlogy
mean sum prod std var var_mean std_mean max min median norm linalg_vector_norm cumsum cumprod
logcumsumexp sort topk gather scatter scatter_add index_select index index_add index_put
masked_fill masked_select take take_along_dim
as_strided_copy cat chunk diagonal diag_embed expand expand_copy flip permute repeat reshape
roll select slice split split_with_sizes squeeze stack t transpose tril triu unbind unfold
unsqueeze view _unsafe_view view_as _reshape_alias unsafe_split movedim narrow constant_pad_nd
reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
replication_pad3d pixel_shuffle pixel_unshuffle select_scatter slice_scatter diagonal_scatter
convolution max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d
_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
fractional_max_pool2d fractional_max_pool3d upsample_nearest1d upsample_nearest2d
upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
upsample_trilinear3d im2col col2im grid_sampler_2d grid_sampler_3d
_native_batch_norm_legit_functional native_batch_norm _native_batch_norm_legit
native_layer_norm native_group_norm _fused_rms_norm rms_norm
_softmax _safe_softmax _log_softmax nll_loss_forward nll_loss2d_forward mse_loss soft_margin_loss
binary_cross_entropy multi_margin_loss multilabel_margin_loss_forward kl_div embedding
_to_copy _conj view_as_real view_as_complex real imag
"""
_MAKING = """
arange empty empty_like eq eye full full_like ge gt isfinite isinf isnan le linspace
logical_and logical_not logical_or logical_xor lt ne new_empty new_full new_ones new_zeros ones
ones_like one_hot scalar_tensor zeros zeros_like argmax argmin any all bitwise_and bitwise_not
bitwise_or
"""

#: Names of ATen ops whose reverse-mode formula is the derivative of their value (almost
#: everywhere): elementwise ops, products, reductions, reshapes, layers, losses.
EXACT_OPS = frozenset(_EXACT.split())

#: Ops that make values without reading differentiable ones; nothing to prove.
_MAKERS = frozenset(_MAKING.split())


def asymmetry(step: StepGraph) -> str | None:
    """Why the Jacobian of the inner gradient is not known to be symmetric; None if proved."""
    for node in calls(step, Phase.FORWARD, Phase.LOSS):
        reason = None if is_projection(node) else inexactness(node)
        if reason:
            source = node.meta.get("source")
            return f"{reason}{f' at {source.short}' if source else ''}"
    return _altered_gradient(step)


def inexactness(node: fx.Node) -> str | None:
    """Why this op's backward is not the derivative of its value; one row a rule."""
    target: Any = node.target
    name = target._schema.name.split("::")[-1]
    if target is aten.detach.default:
        return "a stop-gradient (detach or no_grad)"
    if not target._schema.name.startswith("aten::"):
        return f"a declared derivative ({name})"
    if name == "embedding":
        padding, scaled = _embedding_flags(node)
        if padding >= 0:
            return "an embedding whose padding row gets no gradient"
        if scaled:
            return "an embedding that scales its gradient by frequency"
    if name in EXACT_OPS or name in _MAKERS:
        return None
    return f"no rule says that the backward of {name} is its derivative"


def _embedding_flags(node: fx.Node) -> tuple[int, bool]:
    args = [*node.args, *([None] * 5)]
    padding = args[2] if args[2] is not None else node.kwargs.get("padding_idx", -1)
    scaled = args[3] if args[3] is not None else node.kwargs.get("scale_grad_by_freq", False)
    return int(padding), bool(scaled)  # type: ignore[arg-type]


def _altered_gradient(step: StepGraph) -> str | None:
    """Differentiate the forward and loss phases again and compare with the gradient phase."""
    gradients = [(v, n) for v, n in step.outputs_with(Role.GRADIENT) if n is not None]
    inputs = {value.label: node for value, node in zip(step.inputs, step.placeholders, strict=True)}
    ((_, loss),) = step.outputs_with(Role.LOSS)
    recorder, fakes = start(step)
    sought = [inputs[value.label] for value, _ in gradients]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        bound = dict(zip(step.placeholders, tensors, strict=True))

        def value_of(*leaves: Tensor) -> Tensor:
            replay = Replay(recorder)
            replay.values.update(bound)
            replay.bind(sought, leaves)
            with torch.enable_grad():
                replay.run(calls(step, Phase.FORWARD, Phase.LOSS))
            recorder.origin, recorder.phase = None, Phase.GRADIENT
            return replay.values[loss]  # type: ignore[no-any-return, index]

        positions = tuple(range(len(sought)))
        derived: tuple[Tensor, ...] = torch.func.grad(value_of, argnums=positions)(
            *(bound[node] for node in sought)
        )
        return derived

    derived = recorder.run(run, fakes)
    ours: dict[fx.Node, Any] = {}
    theirs: dict[fx.Node, Any] = {}
    for (value, node), tensor in zip(gradients, derived, strict=True):
        other = recorder.node_of(tensor)
        assert other is not None
        if _term(node, ours) != _term(other, theirs):
            return f"the inner gradient of {value.label} is not that of the loss (a hook?)"
    return None


def _term(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """A hash of the expression that `node` stands for, blind to sharing and order."""
    if node not in known:
        stack = [node]
        while stack:
            current = stack[-1]
            pending = [n for n in current.all_input_nodes if n not in known]
            if pending:
                stack.extend(pending)
                continue
            stack.pop()
            known.setdefault(current, _hash(current, known))
    return known[node]


_IDENTITIES = (aten.detach.default, aten.alias.default, aten.clone.default)
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def _hash(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    if node.op == "placeholder":
        return hash(node.name)
    if node.target in _IDENTITIES:
        return known[node.all_input_nodes[0]]
    if node.target in _RESHAPES:
        return _hash_reshape(node, known)
    args: Any = node.args
    if node.target is aten.native_batch_norm_backward.default and args[7]:
        args = (*args[:3], None, None, *args[5:])  # in training it reads no running statistics
    if node.target is aten.convolution_backward.default and not args[-1][2]:
        args = (*args[:3], None, *args[4:])  # the bias's shape, of which no gradient is asked
    target: Any = node.target
    if target is aten._native_batch_norm_legit_functional.default and args[5]:
        target, args = aten._native_batch_norm_legit.no_stats, (*args[:3], *args[5:])
    described = fx.map_arg((args, node.kwargs), lambda n: known[n])
    return hash((str(target), repr(described)))


def _hash_reshape(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """Several reshapes in a row are one; one that keeps the shape is none."""
    shape = tuple(node.meta["val"].shape)
    source = node.all_input_nodes[0]
    while source.target in (*_RESHAPES, *_IDENTITIES):
        source = source.all_input_nodes[0]
    if tuple(source.meta["val"].shape) == shape:
        return known[source]
    return hash(("reshape", known[source], shape))
