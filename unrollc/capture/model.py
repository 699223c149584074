"""The user's model and loss, run on traced tensors, and their inner gradient."""

from __future__ import annotations

import contextlib
import functools
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch.compiler import _compile_session_context
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode

from unrollc.capture.attributes import Attributes, Carried, Fresh, attributes_carried
from unrollc.capture.batches import as_arguments
from unrollc.capture.equivalents import equivalent
from unrollc.capture.functions import declared_functions
from unrollc.capture.nests import map_tensors
from unrollc.capture.problem import Loss, Objective, Problem, Stock
from unrollc.capture.record import Recorder
from unrollc.capture.refusals import ReadsDataError
from unrollc.capture.source import error_source
from unrollc.capture.values import read_values
from unrollc.capture.wrappers import wrappers_undone
from unrollc.errors import CaptureError, UnrollcError
from unrollc.step import Phase

T = TypeVar("T")


def captured(capture: Callable[[bool], T]) -> T:
    """``capture(False)``; where that reads data, ``capture(True)``, as code that is compiled.

    Libraries look into tensors for a short cut (is there any padding?) and leave that out where
    `torch.compiler.is_compiling` says so. Where both ways fail, the first error counts.
    """
    try:
        return capture(False)
    except ReadsDataError:
        with contextlib.suppress(CaptureError):
            return capture(True)
        raise


def module_names(problem: Problem) -> dict[int, str]:
    """Dotted names of all modules by id."""
    return {
        id(child): f"{prefix}{name}" or type(child).__name__
        for prefix, module in problem.modules.items()
        for name, child in module.named_modules()
    }


@contextlib.contextmanager
def capturing(problem: Problem, recorder: Recorder, start: Attributes) -> Iterator[Carried]:
    """Settings under which user code is traced; everything is restored afterwards.

    Fused attention has no double backward and fused recurrent kernels no decomposition, so the
    plain ones are captured.

    Args:
        problem: The user's objects.
        recorder: What they are recorded by.
        start: The attributes of modules as the step before left them.
    """
    check_hooks(problem)
    with (
        _ONE_AT_A_TIME,
        _plain_kernels(),
        declared_functions(recorder),
        wrappers_undone(recorder.sources),
        torch.enable_grad(),
        _generators_restored(),
        attributes_carried(problem, start) as carried,
    ):
        recorder.stale = carried.before.stale
        yield carried


#: Captures change settings of the whole process, so one runs at a time.
_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    fastpath = torch.backends.mha.get_fastpath_enabled()
    fused_recurrent = torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch._C._set_mkldnn_enabled(fused_recurrent)


@contextlib.contextmanager
def _generators_restored() -> Iterator[None]:
    """Capture draws no numbers from the user's generators: torch's, Python's and NumPy's.

    Raises:
        CaptureError: If user code draws from Python's or NumPy's, which cannot be seen op by op.
    """
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    legacy = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
        if random.getstate() != python:
            raise _drawn_by("random")
        if legacy is not None and pickle.dumps(numpy.random.get_state()) != pickle.dumps(legacy):
            raise _drawn_by("numpy.random")
    finally:
        random.setstate(python)
        if legacy is not None:
            numpy.random.set_state(legacy)


def _drawn_by(generator: str) -> CaptureError:
    return CaptureError(
        f"the code draws numbers from {generator}",
        why="it runs once, when a step is captured: every inner step would see the same numbers",
        remedy="draw them with torch (torch.rand, torch.randn, dropout), or before the call, and "
        "pass them in the batch",
    )


def check_hooks(problem: Problem) -> None:
    """Refuse hooks that `torch.func` cannot run."""
    names = module_names(problem)
    for module in (m for root in problem.modules.values() for m in root.modules()):
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                f"module {names[id(module)]!r} has a backward hook",
                why="module backward hooks cannot be traced",
                remedy="use tensor.register_hook inside forward, or parameter.register_hook",
            )


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class _Substituted(TorchFunctionMode):
    """Puts traced tensors in place of the user's own wherever torch functions receive these.

    Modules are swapped as a whole; this is for references that were taken before, such as
    ``params = list(model.parameters())`` in a regulariser, which mean the fast weights too.
    """

    def __init__(self, replacements: Mapping[int, Tensor], recorder: Recorder) -> None:
        super().__init__()
        self._replacements = replacements
        self._read = functools.partial(read_values, recorder)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def replaced(tensor: Tensor) -> Tensor:
            return self._replacements.get(id(tensor), tensor)

        if func == _DATA:  # torch.func records no stop-gradient for it
            return replaced(args[0]).detach()
        if func is Tensor.__deepcopy__:  # of a parameter: a leaf of its own, which starts anew
            copied = args[1][id(args[0])] = replaced(args[0]).detach().clone()
            return copied
        if func is F.scaled_dot_product_attention:  # whatever kernel the model asks for
            with sdpa_kernel(SDPBackend.MATH):
                return func(*map_tensors(replaced, args), **map_tensors(replaced, kwargs or {}))
        stands = equivalent(func, self._read) or func
        return stands(*map_tensors(replaced, args), **map_tensors(replaced, kwargs or {}))


def run_user_loss(
    problem: Problem,
    stock: Stock,
    loss: Loss,
    recorder: Recorder,
    tensors: dict[str, Tensor],
    batch: Any,
) -> Tensor:
    """The loss of one batch with every parameter and buffer replaced.

    Args:
        problem: The user's objects.
        stock: Their tensors.
        loss: ``problem.loss`` or ``problem.val_loss``.
        recorder: Told when the model is left and the loss begins.
        tensors: Replacements by label; buffers that the forward rebinds are updated in it.
        batch: ``(inputs, target)``, or what an objective takes.
    """
    with contextlib.ExitStack() as entered:
        entered.enter_context(in_place_of_users(problem, stock, recorder, tensors))
        entered.enter_context(Fresh(recorder.stale, recorder.sources))
        if recorder.compiling:
            entered.enter_context(_compile_session_context())
        # For torch.autograd.grad by a tensor that the loss marks with requires_grad_().
        entered.enter_context(enable_inplace_requires_grad(True))
        recorder.phase = Phase.FORWARD
        if isinstance(loss, Objective):
            value = loss.fn(problem.model, batch)
        else:
            inputs, target = batch
            prediction = problem.model(*as_arguments(inputs))
            recorder.phase = Phase.LOSS
            value = loss(prediction, target)
        return _scalar(value, problem, loss)


@contextlib.contextmanager
def in_place_of_users(
    problem: Problem, stock: Stock, recorder: Recorder, tensors: dict[str, Tensor]
) -> Iterator[None]:
    """User code inside meets traced tensors wherever it reaches for its own.

    Args:
        problem: The user's objects.
        stock: Their tensors.
        recorder: Where the code is recorded.
        tensors: Replacements by label; buffers that the code rebinds are updated in it.
    """
    with contextlib.ExitStack() as stack:
        modules: dict[str, nn.Module] = dict(problem.modules)
        if problem.average is not None:
            modules[problem.average_prefix] = problem.average
        for prefix, module in modules.items():
            own = {
                label.removeprefix(prefix): tensor
                for label, tensor in tensors.items()
                if label.startswith(prefix)
            }
            stack.enter_context(swapped(module, own, prefix, tensors))
        originals = {**stock.theta, **stock.context, **stock.buffers, **stock.average}
        known = {label: t for label, t in originals.items() if label in tensors}
        replacements = {id(t): tensors[label] for label, t in known.items()}
        stack.enter_context(_Substituted(replacements, recorder))
        yield


@contextlib.contextmanager
def swapped(
    module: nn.Module, own: dict[str, Tensor], prefix: str, tensors: dict[str, Tensor]
) -> Iterator[None]:
    """While traced tensors stand in a module.

    Args:
        module: The user's module.
        own: The tensors by name.
        prefix: What their labels start with.
        tensors: Updated with those that code inside rebinds.
    """
    names = {name for name, _ in module.named_parameters()} | {n for n, _ in module.named_buffers()}
    own = {name: tensor for name, tensor in own.items() if name in names}
    with _reparametrize_module(module, own, tie_weights=True):
        yield
    tensors.update({prefix + name: tensor for name, tensor in own.items()})


def _name_of(problem: Problem, loss: Loss) -> str:
    """What errors call a loss."""
    name = str(getattr(loss, "__name__", type(loss).__name__))
    return f"{name} (val_loss)" if loss is not problem.loss else name


def _scalar(value: Any, problem: Problem, loss: Loss) -> Tensor:
    name = _name_of(problem, loss)
    if not isinstance(value, Tensor):
        raise CaptureError(
            f"the loss {name} returned {type(value).__name__}, not a tensor",
            remedy="return a scalar tensor that depends on the prediction",
        )
    if value.dim() != 0:
        raise CaptureError(
            f"the loss {name} is not a scalar: it has shape {list(value.shape)}",
            why="inner and outer loss are one number each",
            remedy="reduce it, e.g. with .mean()",
        )
    if not value.is_floating_point():
        raise CaptureError(
            f"the loss {name} has dtype {value.dtype}",
            why="only a floating-point loss has a gradient",
            remedy="use a differentiable loss",
        )
    return value


def inner_gradient(
    problem: Problem,
    stock: Stock,
    recorder: Recorder,
    theta: dict[str, Tensor],
    extra: dict[str, Tensor],
    rest: dict[str, Tensor],
    batch: Callable[[Mapping[str, Tensor]], Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """The inner loss and its gradient, by `torch.func.grad`.

    Args:
        theta: Fast weights by label.
        extra: Other tensors whose gradient is recorded too (mixed mode needs it); a label of a
            batch leaf stands for that leaf.
        rest: The remaining parameters, all buffers and the other leaves of the batch.
        batch: The batch in the user's structure, given its leaves by label.

    Returns:
        Gradients of θ, gradients of `extra`, the loss, and the tensors after the forward pass.
    """

    def run_loss(
        theta: dict[str, Tensor], extra: dict[str, Tensor], rest: dict[str, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        tensors = {**rest, **theta, **extra}
        value = run_user_loss(problem, stock, problem.loss, recorder, tensors, batch(tensors))
        recorder.phase = Phase.GRADIENT
        after = {label: tensors[label] for label in rest}
        return value, (value, after)

    (grads, extra_grads), (value, after) = torch.func.grad(run_loss, argnums=(0, 1), has_aux=True)(
        theta, extra, rest
    )
    return grads, extra_grads, value, after


def with_parameter_hooks(
    parameters: Mapping[str, Tensor], gradients: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients after the hooks that the user registered on parameters."""
    hooked = dict(gradients)
    for label in gradients:
        parameter = parameters[label]
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise CaptureError(
                f"{label} has a post-accumulate-grad hook",
                why="such a hook acts on the parameter itself, outside the optimizer's step",
                remedy="use parameter.register_hook, or put the transformation into the optimizer",
            )
        for hook in (parameter._backward_hooks or {}).values():
            replaced = hook(hooked[label])
            hooked[label] = hooked[label] if replaced is None else replaced
    return hooked


@contextlib.contextmanager
def explained(
    what: str,
    remedy: str = "see the exception above, which PyTorch or your code raised while it ran on "
    "traced tensors",
) -> Iterator[None]:
    """Errors of user code, and of PyTorch inside it, become `CaptureError`s with the line."""
    try:
        yield
    except (UnrollcError, AssertionError):
        raise
    except Exception as error:
        raise CaptureError(
            f"{what} cannot be captured: {type(error).__name__}: {error}",
            where=error_source(error),
            remedy=remedy,
        ) from error
