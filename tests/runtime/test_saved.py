"""``lowered.save`` and ``lowered.code``: standalone, readable, the same bytes every time."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import compiled, gradients
from tests.oracles import cases, eager
from tests.oracles.compare import assert_close, relative_error
from tests.oracles.models import DropoutMLP
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

ROOT = Path(__file__).resolve().parents[2]

RUN_SAVED = """
import importlib.util, sys
sys.modules["unrollc"] = None  # importing it fails, installed or not
import torch
path, inputs, output, *seeds = sys.argv[1:]
spec = importlib.util.spec_from_file_location("saved", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
results = []
for seed in seeds:
    loss, gradients = module.loss_and_gradients(torch.load(inputs), seed=int(seed))
    results.append((loss.detach(), {name: g.detach() for name, g in gradients.items()}))
torch.save(results, output)
"""


def run_saved(
    path: Path, inputs: dict[str, Tensor], *seeds: int
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Run a saved program in a fresh, isolated interpreter, once for each seed."""
    data, output = path.with_suffix(".inputs"), path.with_suffix(".outputs")
    torch.save({name: value.detach() for name, value in inputs.items()}, data)
    command = [sys.executable, "-I", "-c", RUN_SAVED, path, data, output, *map(str, seeds)]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(output)


@pytest.mark.parametrize(("model", "optimizer"), [("mlp", "sgd-momentum"), ("conv", "adam")])
def test_a_saved_program_needs_torch_alone(model: str, optimizer: str, tmp_path: Path) -> None:
    case = cases.build(model, optimizer, 3)
    wanted = gradients(case.unroll().loss, case.meta)
    program = compiled(case)
    inputs = program.inputs(case.train, case.val)
    assert all(isinstance(value, Tensor) for value in inputs.values())
    path = tmp_path / "meta.py"
    program.lower(case.train, case.val).save(path)
    ((loss, found),) = run_saved(path, inputs, 0)
    assert relative_error(loss, case.unroll().loss) < 1e-12
    assert len(found) == len(case.meta)
    for name, gradient in found.items():
        # The names are the program's own: a name's input tells which meta-parameter it is, by
        # the memory that both share.
        (meta,) = [k for k, v in case.meta.items() if v.data_ptr() == inputs[name].data_ptr()]
        assert_close({name: gradient}, {name: wanted[meta]})


def test_a_saved_program_takes_other_values(tmp_path: Path) -> None:
    case = cases.build("mlp", "adamw", 3)
    program = compiled(case)
    path = tmp_path / "meta.py"
    program.lower(case.train, case.val).save(str(path))
    with torch.no_grad():
        for tensor in case.meta.values():
            tensor.mul_(1.1)
    ((loss, _),) = run_saved(path, program.inputs(case.train, case.val), 0)
    assert relative_error(loss, case.unroll().loss) < 1e-12


def test_a_saved_program_draws_its_noise_from_the_seed(tmp_path: Path) -> None:
    model = DropoutMLP()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    train = cases.batches((5, 4), 3, seed=1)
    program = unrollc.compile(model, opt, F.cross_entropy)
    path = tmp_path / "meta.py"
    program.lower(train, unstack(train)[0]).save(path)
    first, second, again = run_saved(path, program.inputs(train, unstack(train)[0]), 1, 2, 1)
    assert torch.equal(first[0], again[0])
    assert_close(first[1], again[1], rtol=0)
    assert not torch.equal(first[0], second[0])


PRINT_CODE = """
import sys, torch
torch.set_default_dtype(torch.float64)
import unrollc
from tests.oracles import cases
for model, optimizer in (("mlp", "adam"), ("conv", "sgd-nesterov")):
    case = cases.build(model, optimizer, 3)
    case.install(unrollc.PerStep)
    program = unrollc.compile(case.model, case.opt, case.loss, val_loss=case.val_loss)
    sys.stdout.write(program.lower(case.train, case.val).code)
"""


def printed_code(hash_seed: str) -> bytes:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_CODE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_code_is_the_same_bytes_in_two_processes() -> None:
    first, second = printed_code("1"), printed_code("2")
    assert first
    assert first == second


def test_code_is_the_same_bytes_whatever_was_compiled_before() -> None:
    def code() -> str:
        case = cases.build("mlp", "adam", 3)
        return compiled(case).lower(case.train, case.val).code

    first = code()
    other = cases.build("lstm", "sgd", 2)
    compiled(other)(other.train, other.val).loss.backward()
    assert code() == first


def test_code_is_readable_python() -> None:
    case = cases.build("conv", "adam", 3)
    code = compiled(case).lower(case.train, case.val).code
    ast.parse(code)
    assert "conv1_weight" in code  # names come from the model
    assert not re.search(r"\b0x[0-9a-f]{6,}", code)  # no addresses
    assert str(ROOT) not in code


STRANGE = ["for", "1st", "a b", "a_b", "import os\nraise SystemExit", '"]; x = 1 #', "α", "torch"]


class StrangeNames(nn.Module):
    """Submodules under names that are no identifiers, or that code would stumble over."""

    def __init__(self) -> None:
        super().__init__()
        for name in STRANGE:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for name in STRANGE:
            x = torch.tanh(self.get_submodule(name)(x))
        return x[:, :3]


def test_no_name_becomes_code(tmp_path: Path) -> None:
    model = StrangeNames()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    train = cases.batches((5, 4), 2, seed=1)
    batches = unstack(train)
    expected = eager.unroll(model, opt, F.cross_entropy, batches, batches[0])
    program = unrollc.compile(model, opt, F.cross_entropy)
    theta = dict(model.named_parameters())
    found = gradients(program(train, batches[0]).loss, theta)
    assert_close(found, gradients(expected.loss, theta))
    lowered = program.lower(train, batches[0])
    tree = ast.parse(lowered.code)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert "os" not in imported
    path = tmp_path / "meta.py"
    lowered.save(path)
    ((loss, _),) = run_saved(path, program.inputs(train, batches[0]), 0)
    assert relative_error(loss, expected.loss) < 1e-12
