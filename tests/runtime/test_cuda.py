"""On a device, nothing in the loop makes the host wait or copies between the two.

Without a device, programs run on tensors that say they are on one (`stand_in_cuda`), in a process
of their own; with one, they run there.
"""

import json
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.oracles.cuda_programs import BROKEN, ON_DEVICE, PROGRAMS, generated, gradients, settled
from tests.oracles.device_traffic import faults_of_call, faults_of_code
from tests.oracles.pretended_cuda import compiler, printed_by
from unrollc.codegen.literals import tensor_literal

aten = torch.ops.aten

pretended = pytest.mark.skipif(
    compiler() is None or torch.version.cuda is not None,
    reason="needs a C++ compiler and a PyTorch without CUDA",
)
real = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pretended")
    results: dict[str, Any] = json.loads(printed_by("tests.oracles.cuda_programs", folder))
    return results


@pretended
def test_the_loop_stays_on_the_device(found: dict[str, Any]) -> None:
    assert found["programs"].keys() == PROGRAMS.keys()
    for name, result in found["programs"].items():
        assert result["ran"][0] > 400, name
        assert result["graphs"] == {}, name
        assert result["code"] == [], name
        assert result["inside"] == [], name
        assert result["losses"] == "cuda", name
        assert result["error"] < 1e-12, name


@pretended
def test_a_call_copies_learned_numbers_of_the_host_once_each_way(found: dict[str, Any]) -> None:
    there, back = ("aten._to_copy.default copies to the " + end for end in ("device", "host"))
    for name, result in found["programs"].items():
        away = result["away"]
        assert sorted(result["call"]) == [there] * away + [back] * away, name


@pretended
@pytest.mark.parametrize("line", BROKEN)
def test_a_host_that_takes_part_is_found(found: dict[str, Any], line: str) -> None:
    assert found["twins"][line]


def test_ops_on_fake_cuda_tensors_are_told_apart() -> None:
    with FakeTensorMode():
        vector, mask = torch.empty(3, device="cuda"), torch.empty(3, device="cuda").bool()
        index, number = torch.empty(2, dtype=torch.long, device="cuda"), torch.empty(())
        host = torch.empty(3)
    silent = [
        (aten.mul.Tensor, [vector, number], vector),
        (aten.index.Tensor, [vector, index], vector),
        (aten.add.Tensor, [host, number], host),
        (aten.sum.default, [vector], vector),
    ]
    for op, operands, result in silent:
        assert not faults_of_call(op, operands, [result])
    loud = [
        (aten._local_scalar_dense.default, [vector], []),
        (aten.nonzero.default, [vector], [index]),
        (aten.masked_select.default, [vector, mask], [vector]),
        (aten.equal.default, [vector, vector], []),
        (aten._unique2.default, [vector], [vector]),
        (aten.index.Tensor, [vector, mask], [vector]),
        (aten.index_put.default, [vector, mask, vector], [vector]),
        (aten._to_copy.default, [vector], [host]),
        (aten._to_copy.default, [host], [vector]),
        (aten.copy_.default, [vector, host], [vector]),
        (aten.copy_.default, [number, vector], [number]),
        (aten.mul.Tensor, [vector, host], [vector]),
        (aten.stack.default, [vector, number], [vector]),
    ]
    for op, operands, results in loud:
        assert faults_of_call(op, operands, results), op


def test_telltale_lines_of_code_are_found() -> None:
    sound = (
        "losses[j] = loss\nop_sum = torch.ops.aten.sum.default\nCONSTANT_0 = torch.tensor(0.5)\n"
    )
    assert faults_of_code(sound) == []
    for line in (
        "x = loss.item()",
        "x = float(loss)",
        "y = x.cpu()",
        'y = torch.empty([3], device="cpu")',
        "y = x.to(z)",
        "CONSTANT_0 = torch.tensor([1.0, 2.0], dtype=torch.float32)",
    ):
        assert faults_of_code(sound + line) == [line]


def test_a_constant_names_its_device() -> None:
    with FakeTensorMode():
        where = torch.empty(3, device="cuda").device

    class Placed(torch.Tensor):
        device = where

    tensor = torch.tensor([1.0, 2.0])
    assert tensor_literal(tensor) == "torch.tensor([1.0, 2.0], dtype=torch.float32)"
    line = tensor_literal(tensor.as_subclass(Placed))
    assert line == 'torch.tensor([1.0, 2.0], dtype=torch.float32, device="cuda:0")'


@real
@pytest.mark.parametrize("name", ON_DEVICE)
def test_gradients_on_a_device_are_those_of_the_cpu(name: str) -> None:
    host = settled(ON_DEVICE["adam" if name == "adam, capturable" else name], lambda t: t)
    device = settled(ON_DEVICE[name], torch.Tensor.cuda)
    if "dropout" in name:
        pytest.skip("the device's generator draws other numbers")
    for ours, theirs in zip(gradients(device), gradients(host), strict=True):
        assert torch.allclose(ours.cpu(), theirs, rtol=1e-9, atol=1e-12)


@real
@pytest.mark.parametrize("name", ON_DEVICE)
def test_a_warm_loop_does_not_synchronise(name: str) -> None:
    setting = settled(ON_DEVICE[name], torch.Tensor.cuda)
    inputs = setting.program.inputs(setting.train, setting.val)
    names = generated(setting.program.lower(setting.train, setting.val).code)
    names["loss_and_gradients"](inputs, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        names["loss_and_gradients"](inputs, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@real
@pytest.mark.parametrize("name", [name for name in ON_DEVICE if "dropout" not in name])
def test_a_warm_loop_is_captured_into_a_graph(name: str) -> None:
    setting = settled(ON_DEVICE[name], torch.Tensor.cuda)
    inputs = setting.program.inputs(setting.train, setting.val)
    names = generated(setting.program.lower(setting.train, setting.val).code)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        expected, slopes = names["loss_and_gradients"](inputs, 0)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradients = names["loss_and_gradients"](inputs, 0)
    graph.replay()
    assert torch.equal(loss, expected)
    for label, slope in slopes.items():
        for ours, theirs in zip(_each(gradients[label]), _each(slope), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=0)


def _each(value: Any) -> list[torch.Tensor]:
    return value if isinstance(value, list) else [value]
