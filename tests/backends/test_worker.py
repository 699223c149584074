"""The process that compiles: what cannot be one C function keeps Inductor's own wrapper."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from unrollc.backends import worker
from unrollc.backends.library import NATIVE, WRAPPED, runner_of
from unrollc.backends.toolchain import toolchain

TEXT = """
def compute(call, v0, v1, ):
    n0 = call('aten.mm.default', v0, v1)
    n1 = call('aten.tanh.default', n0)
    return (n1, )
"""

#: A worker whose translation forgets the last line of every function: its results are not written.
WRONG = """
import sys
from pathlib import Path
sys.path.insert(0, {home!r})
import worker
right = worker.native.native
def wrong(*arguments):
    lines = right(*arguments).splitlines()
    last = max(n for n, line in enumerate(lines) if line.startswith("        cpp_fused"))
    return "\\n".join(lines[:last] + lines[last + 1:])
worker.native.native = wrong
worker.main(Path({folder!r}))
"""


def test_a_wrong_c_function_is_found_and_replaced(tmp_path: Path) -> None:
    spec = {"shape": [4, 4], "stride": [4, 1], "dtype": "torch.float64", "device": "cpu"}
    kernel = {
        "text": TEXT,
        "inputs": [spec, spec],
        "outputs": [spec],
        "threads": 1,
        "device": "cpu",
        "awaited": True,
    }
    job = {"settings": {"cpp.cxx": [toolchain().compiler]}, "kernels": {"one": kernel}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    home = str(Path(worker.__file__).parent)
    script = WRONG.format(folder=str(tmp_path), home=home)
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    made = tmp_path / "one"
    assert "DisagreementError" in said.stdout and (made / "done").exists(), said.stderr[-500:]
    assert (made / WRAPPED).exists() and not (made / NATIVE).exists()
    left, right = torch.randn(2, 4, 4, dtype=torch.float64)
    (result,) = runner_of(made, "cpu", [spec])([left, right])
    torch.testing.assert_close(result, torch.tanh(left @ right))
