"""Bad input gets an error that names it."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.oracles import cases, models
from tests.oracles.models import MLP, Branching, ConvNet, WeightedLoss
from tests.oracles.objectives import unstack
from unrollc.runtime.options import read_budget

pytestmark = pytest.mark.usefixtures("float64")

T = 4
X, Y = cases.batches((5, 4), T, seed=1)
BATCH = (X[0], Y[0])


class Setting:
    def __init__(self) -> None:
        self.model = MLP()
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def compile(self, **options: Any) -> Any:
        arguments = {"model": self.model, "opt": self.opt, "loss": F.cross_entropy, **options}
        return unrollc.compile(**arguments)

    def run(self, train: Any = (X, Y), val: Any = BATCH, **options: Any) -> Any:
        return self.compile(**options)(train, val)


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_all_errors_are_of_one_family() -> None:
    for name in ("InputError", "CaptureError", "RequirementError"):
        assert issubclass(getattr(unrollc, name), unrollc.UnrollcError)


# --- batches --------------------------------------------------------------------------------------


WRONG_FORMS: dict[str, tuple[Callable[[], Any], str]] = {
    "a tensor alone": (lambda: X, "stacked"),
    "a tuple of batches": (lambda: tuple(unstack((X, Y))), "list"),
    "two batches in a tuple": (lambda: tuple(unstack((X, Y)))[:2], "list"),
    "a generator of batches": (lambda: iter(unstack((X, Y))), "list"),
    "one batch as a list": (lambda: [X[0], Y[0]], "batch"),
    "a list of inputs": (lambda: list(X), "list"),
    "a list of triples": (lambda: [(x, y, y) for x, y in unstack((X, Y))], "list"),
    "a stacked triple": (lambda: (X, Y, Y), "stacked"),
    "scalars without T": (lambda: (torch.tensor(1.0), torch.tensor(1)), "stacked"),
    "repeat of inputs alone": (lambda: unrollc.repeat(X[0], T), "repeat"),
    "an empty list": (list, "empty"),
    "a dict": (lambda: {"inputs": X, "target": Y}, "dict"),
    "None": (lambda: None, "None"),
}


@pytest.mark.parametrize("form", WRONG_FORMS)
def test_a_wrong_form_says_what_it_looked_most_like(setting: Setting, form: str) -> None:
    make, word = WRONG_FORMS[form]
    with pytest.raises(unrollc.InputError) as error:
        setting.run(make())
    text = str(error.value)
    assert "train" in text or "batch" in text
    assert word in text
    if word in ("stacked", "list", "batch"):
        assert re.search(r"most like|looks like|read as", text)


@pytest.mark.parametrize("val", [X[0], None, (X[0],), (X[0], Y[0], Y[0]), [BATCH, BATCH, BATCH]])
def test_a_wrong_validation_batch(setting: Setting, val: Any) -> None:
    with pytest.raises(unrollc.InputError, match="val"):
        setting.run(val=val)


def test_numpy_arrays_and_numbers_are_no_tensors(setting: Setting) -> None:
    with pytest.raises(unrollc.InputError, match=r"ndarray.*tensor"):
        setting.run(train=(X.numpy(), Y))
    with pytest.raises(unrollc.InputError, match=r"val.*int"):
        setting.run(val=(X[0], 3))


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_repeat_wants_a_positive_number_of_steps(setting: Setting, steps: Any) -> None:
    with pytest.raises(unrollc.InputError, match="repeat"):
        setting.run(train=unrollc.repeat(BATCH, steps))


def test_no_steps(setting: Setting) -> None:
    with pytest.raises(unrollc.InputError, match="T = 0"):
        setting.run(train=(X[:0], Y[:0]))


def test_T_differs_between_stacked_tensors(setting: Setting) -> None:  # noqa: N802
    with pytest.raises(unrollc.InputError, match=r"T differs") as error:
        setting.run(train=(X, Y[: T - 1]))
    assert all(str(number) in str(error.value) for number in (T, T - 1))


def test_T_differs_from_a_per_step_value(setting: Setting) -> None:  # noqa: N802
    setting.opt.param_groups[0]["lr"] = unrollc.PerStep(torch.full((T + 3,), 0.1))
    with pytest.raises(unrollc.InputError) as error:
        setting.run()
    assert all(part in str(error.value) for part in ('param_groups[0]["lr"]', "4", "7"))


def test_inputs_that_the_model_refuses(setting: Setting) -> None:
    """The model's own error is the cause; the text says where it happened."""
    with pytest.raises(unrollc.UnrollcError, match=r"models\.py|mat1"):
        setting.run(train=(X[..., :3], Y))


def test_a_per_step_value_of_the_wrong_shape() -> None:
    for wrong in (torch.ones(T, 2), torch.tensor(0.1), [0.1] * T, torch.ones(T, dtype=torch.int)):
        with pytest.raises(unrollc.InputError, match="PerStep"):
            unrollc.PerStep(wrong)


# --- parameters -----------------------------------------------------------------------------------


def test_a_parameter_that_the_model_does_not_own(setting: Setting) -> None:
    stranger = nn.Parameter(torch.zeros(7, 3))
    opt = torch.optim.SGD([*setting.model.parameters(), stranger], lr=0.1)
    with pytest.raises(unrollc.InputError, match=r"param_groups\[0\]") as error:
        setting.run(opt=opt)
    assert "[7, 3]" in str(error.value)


def test_an_optimizer_of_another_copy_of_the_model(setting: Setting) -> None:
    with pytest.raises(unrollc.InputError, match="not a parameter of the model"):
        setting.run(model=MLP())


def test_an_optimizer_of_nothing_that_requires_grad(setting: Setting) -> None:
    for param in setting.model.parameters():
        param.requires_grad_(False)
    with pytest.raises(unrollc.InputError, match="requires grad"):
        setting.run()


def test_mixed_devices(setting: Setting) -> None:
    setting.model.output.bias = nn.Parameter(torch.empty(3, device="meta"))
    opt = torch.optim.SGD(setting.model.parameters(), lr=0.1)
    with pytest.raises(unrollc.InputError, match=r"output\.bias") as error:
        setting.run(opt=opt)
    assert "meta" in str(error.value)
    assert "cpu" in str(error.value)


def test_data_on_another_device(setting: Setting) -> None:
    with pytest.raises(unrollc.InputError, match=r"train\.inputs") as error:
        setting.run(train=(X.to("meta"), Y))
    assert "meta" in str(error.value)


def test_a_hyperparameter_of_several_numbers(setting: Setting) -> None:
    setting.opt.param_groups[0]["lr"] = torch.tensor([0.1, 0.2], requires_grad=True)
    with pytest.raises(unrollc.InputError, match=r'param_groups\[0\]\["lr"\]'):
        setting.run()


# --- loss -----------------------------------------------------------------------------------------


def test_a_loss_that_is_no_scalar(setting: Setting) -> None:
    def each(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target, reduction="none")

    with pytest.raises(unrollc.UnrollcError, match="scalar") as error:
        setting.run(loss=each)
    assert "[5]" in str(error.value)
    with pytest.raises(unrollc.UnrollcError, match="scalar") as error:
        setting.run(val_loss=each)
    assert "val" in str(error.value)


@pytest.mark.parametrize("value", [1.0, None, (torch.tensor(1.0),)])
def test_a_loss_that_is_no_tensor(setting: Setting, value: Any) -> None:
    with pytest.raises(unrollc.UnrollcError, match=rf"loss.*{type(value).__name__}"):
        setting.run(loss=lambda prediction, target: value)


def test_an_inner_loss_that_depends_on_no_parameter(setting: Setting) -> None:
    with pytest.raises(unrollc.UnrollcError, match="loss"):
        setting.run(loss=lambda prediction, target: prediction.detach().sum())


# --- meta-parameters ------------------------------------------------------------------------------


class WithSpare(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))


def test_a_meta_parameter_that_nothing_depends_on() -> None:
    model = WithSpare()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for meta in (["spare"], [model.spare]):
        program = unrollc.compile(model, opt, F.cross_entropy, meta=meta)
        with pytest.raises(unrollc.RequirementError, match="spare"):
            program((X, Y), BATCH)
        with pytest.raises(unrollc.RequirementError, match="spare"):
            program.lower((X, Y), BATCH)


def test_a_loss_weight_that_only_shifts_the_loss(setting: Setting) -> None:
    """It moves the inner losses, but no inner gradient and no validation loss."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(()))

        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(prediction, target) + self.offset

    loss = Shifted()
    with pytest.raises(unrollc.RequirementError, match="offset"):
        setting.run(loss=loss, val_loss=F.cross_entropy, meta=[loss.offset])


def test_a_validation_metric_without_a_gradient(setting: Setting) -> None:
    """Requirement I: accuracy is no differentiable function of θ_T; its line is shown."""

    def errors(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction.argmax(-1) != target).double().mean()  # the cut

    with pytest.raises(unrollc.RequirementError, match="argmax") as error:
        setting.run(val_loss=errors, meta=["hidden.weight"])
    assert "test_bad_input.py" in str(error.value)


def test_a_tensor_that_is_not_of_the_program(setting: Setting) -> None:
    stranger = torch.ones(2, requires_grad=True)
    with pytest.raises(unrollc.UnrollcError, match="meta"):
        setting.run(meta=[stranger])


def test_a_name_that_does_not_exist(setting: Setting) -> None:
    with pytest.raises(unrollc.InputError, match=r"hiden\.weight") as error:
        setting.run(meta=["hiden.weight"])
    assert "hidden.weight" in str(error.value)  # what there is


def test_a_meta_parameter_that_does_not_require_grad(setting: Setting) -> None:
    setting.model.hidden.weight.requires_grad_(False)
    with pytest.raises(unrollc.UnrollcError, match=r"hidden\.weight"):
        setting.run(meta=["hidden.weight"])


def test_duplicates(setting: Setting) -> None:
    weight = setting.model.hidden.weight
    for meta in (["hidden.weight", "hidden.weight"], [weight, weight], ["hidden.weight", weight]):
        with pytest.raises(unrollc.InputError, match=r"hidden\.weight"):
            setting.run(meta=meta)


@pytest.mark.parametrize("meta", ["hidden.weight", 3, [1.0], torch.ones(1), [None]])
def test_meta_of_the_wrong_type(setting: Setting, meta: Any) -> None:
    with pytest.raises(unrollc.InputError, match="meta"):
        setting.run(meta=meta)


# --- capture --------------------------------------------------------------------------------------


def test_control_flow_that_depends_on_data_shows_its_line() -> None:
    model = Branching()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    lines, start = inspect.getsourcelines(Branching)
    (line,) = [start + i for i, text in enumerate(lines) if "# the branch" in text]
    with pytest.raises(unrollc.CaptureError) as error:
        unrollc.compile(model, opt, F.cross_entropy)((X, Y), BATCH)
    text = str(error.value)
    assert f"models.py:{line}" in text
    assert "if x.sum() > 0" in text


@pytest.mark.parametrize("cut", [lambda x: x.sum().item(), lambda x: float(x[0, 0])])
def test_numbers_taken_out_of_data(cut: Any) -> None:
    class Itemized(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * cut(x)

    model = Itemized()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(unrollc.CaptureError, match=r"test_bad_input\.py:\d+"):
        unrollc.compile(model, opt, F.cross_entropy)((X, Y), BATCH)


def test_shapes_that_depend_on_data() -> None:
    class Selecting(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[x[:, 0] > 0])

    model = Selecting()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, lambda prediction, target: prediction.sum())
    with pytest.raises(unrollc.CaptureError, match=r"test_bad_input\.py:\d+"):
        program((X, Y), BATCH)


def test_an_error_of_the_users_own_stays_visible(setting: Setting) -> None:
    def fails(prediction: Tensor, target: Tensor) -> Tensor:
        raise KeyError("no such class")

    with pytest.raises((unrollc.UnrollcError, KeyError), match="no such class"):
        setting.run(loss=fails)


# --- numbers --------------------------------------------------------------------------------------


def test_nan_in_training_data_under_debug(setting: Setting) -> None:
    inputs = X.clone()
    inputs[2, 1, 3] = float("nan")
    program = setting.compile(debug=True)
    assert torch.isfinite(program((X, Y), BATCH).loss)
    with pytest.raises(unrollc.UnrollcError, match=r"(?i)nan") as error:
        program((inputs, Y), BATCH)
    assert "train.inputs" in str(error.value)
    assert "2" in str(error.value)  # the step


def test_infinity_in_validation_data_under_debug(setting: Setting) -> None:
    inputs = X[0].clone()
    inputs[0, 0] = float("inf")
    with pytest.raises(unrollc.UnrollcError, match=r"val\.inputs"):
        setting.run(val=(inputs, Y[0]), debug=True)


def test_nan_in_a_parameter_under_debug(setting: Setting) -> None:
    with torch.no_grad():
        setting.model.output.bias[1] = float("nan")
    with pytest.raises(unrollc.UnrollcError, match=r"output\.bias"):
        setting.run(debug=True)


def test_nan_that_arises_on_the_way_under_debug(setting: Setting) -> None:
    """The data are finite; the loss takes a logarithm of a negative number."""

    def broken(prediction: Tensor, target: Tensor) -> Tensor:
        return torch.log(prediction.sum() - 1e6)  # NaN arises here

    with pytest.raises(unrollc.UnrollcError, match=r"(?i)nan"):
        setting.run(loss=broken, debug=True)


def test_nan_goes_through_without_debug(setting: Setting) -> None:
    inputs = X.clone()
    inputs[2, 1, 3] = float("nan")
    assert torch.isnan(setting.run(train=(inputs, Y)).loss)


# --- options --------------------------------------------------------------------------------------


BUDGETS = {
    "64MiB": 64 * 2**20,
    "1.5 GiB": 3 * 2**29,
    "20KB": 20_000,
    " 900B ": 900,
    123: 123,
}


@pytest.mark.parametrize("memory", BUDGETS)
def test_budgets_are_bytes_or_text(memory: Any) -> None:
    assert read_budget(memory) == BUDGETS[memory]


def test_a_budget_that_is_too_small_names_one_that_works(setting: Setting) -> None:
    with pytest.raises(unrollc.BudgetError) as error:
        setting.run(memory="1KiB")
    found = re.search(r"the smallest budget that works is (\d+) bytes", str(error.value))
    assert found is not None
    assert "1.0 KiB" in str(error.value) and "Fix: pass memory=" in str(error.value)
    setting.run(memory=int(found[1]))
    with pytest.raises(unrollc.BudgetError):
        setting.run(memory=int(found[1]) - 1)


@pytest.mark.parametrize("memory", [1.5, -1, 0, "lots", "64", [1], True])
def test_memory_of_the_wrong_type(setting: Setting, memory: Any) -> None:
    with pytest.raises(unrollc.UnrollcError, match="memory"):
        setting.run(memory=memory)


def test_backends_that_work(setting: Setting) -> None:
    losses = [setting.run(backend=backend).loss for backend in ("auto", "aten")]
    assert torch.equal(*losses)
    codes = [
        setting.compile(backend=backend).lower((X, Y), BATCH).code for backend in ("auto", "aten")
    ]
    assert codes[0] == codes[1]


@pytest.mark.parametrize("backend", ["xla", 3, None, "Aten"])
def test_backend_of_the_wrong_kind(setting: Setting, backend: Any) -> None:
    with pytest.raises(unrollc.InputError, match="backend") as error:
        setting.run(backend=backend)
    assert repr(backend) in str(error.value)


@pytest.mark.parametrize("gradient", ["first-order", 2, None, unrollc.FirstOrder, "Exact"])
def test_gradient_of_the_wrong_kind(setting: Setting, gradient: Any) -> None:
    with pytest.raises(unrollc.InputError, match="gradient"):
        setting.run(gradient=gradient)


@pytest.mark.parametrize("k", [0, -2, 1.5, None, True])
def test_truncated_wants_a_positive_number(setting: Setting, k: Any) -> None:
    with pytest.raises(unrollc.InputError, match="Truncated"):
        setting.run(gradient=unrollc.Truncated(k))


def test_arguments_of_compile_of_the_wrong_type(setting: Setting) -> None:
    for name, value in {
        "model": lambda x: x,
        "opt": "sgd",
        "loss": None,
        "val_loss": 3,
    }.items():
        with pytest.raises(unrollc.InputError, match=name):
            setting.run(**{name: value})
    with pytest.raises(unrollc.InputError, match="opt"):
        setting.run(opt=torch.optim.SGD)
    with pytest.raises(unrollc.InputError, match="objective"):
        unrollc.objective("loss")


# --- the twin: what is right raises nothing -------------------------------------------------------


def test_good_input_raises_nothing(setting: Setting) -> None:
    assert torch.isfinite(setting.run(debug=True).loss)
    assert torch.isfinite(setting.run(train=unstack((X, Y))).loss)
    assert torch.isfinite(setting.run(train=unrollc.repeat(BATCH, T)).loss)
    assert torch.isfinite(setting.run(meta=["hidden.weight"], memory=None).loss)
    loss = WeightedLoss()
    assert torch.isfinite(setting.run(loss=loss, val_loss=F.cross_entropy, meta=[loss.weight]).loss)
    model = ConvNet()
    opt = torch.optim.Adam(model.parameters())
    train = cases.batches((6, 1, 4, 4), 2, seed=1)
    program = unrollc.compile(model, opt, F.cross_entropy, debug=True)
    assert torch.isfinite(program(train, unstack(train)[0]).loss)
    assert inspect.getsourcefile(Branching) == models.__file__


def test_an_optimizer_that_needs_a_closure(setting: Setting) -> None:
    model = MLP()
    program = unrollc.compile(model, torch.optim.LBFGS(model.parameters()), F.cross_entropy)
    with pytest.raises(unrollc.CaptureError, match=r"LBFGS\.step needs a closure"):
        program((X, Y), BATCH)
