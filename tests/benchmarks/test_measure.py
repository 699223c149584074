"""Workers, and what is written down of them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from driver import Job, WorkerError, serving
from measure import Settings, measured
from run import merged

SHORT = Settings(rounds=2, steps=2)


def test_a_workload_is_checked_and_measured() -> None:
    entries = measured("mlp-small", ["unrollc aten", "torch.func", "plain training"], SHORT)
    assert [entry["implementation"] for entry in entries] == [
        "unrollc aten",
        "torch.func",
        "plain training",
    ]
    for entry in entries:
        assert "failed" not in entry, entry
        assert len(entry["seconds"]) >= 2 and all(seconds > 0 for seconds in entry["seconds"])
        assert entry["resident"] > 0 and entry["cold"] >= 0 and entry["warm"] >= 0
        assert entry["agreement"]["worst"] <= 1e-8 and entry["steps"] == 2
    assert entries[0]["predicted"] > 0 and entries[0]["operations"] > 0
    parts = entries[0]["profile"]
    assert parts["products"] > 0 and parts["other ops"] > 0 and parts["rest"] > 0
    assert parts["convolutions"] == parts["machine code"] == 0
    assert all("profile" not in entry for entry in entries[1:])


def test_what_cannot_be_done_is_written_down_with_its_reason() -> None:
    (entry,) = measured("mlp-small", ["torch.func"], Settings(check=False, steps=1, limit=0.01))
    assert entry["failed"] == "> 0 s" and "seconds" not in entry
    (entry,) = measured("mlp-long", ["higher"], Settings())
    assert entry["failed"].startswith("left out")


def test_a_limit_ends_a_worker(tmp_path: Path) -> None:
    with serving(Job("mlp-small", "torch.func", steps=1), tmp_path) as worker:
        with pytest.raises(WorkerError, match="> 0 s"):
            worker.prepare(limit=0.01)
        assert worker._process.returncode is not None
        with pytest.raises(WorkerError, match="killed by signal 9"):
            worker.call()


def results(date: str, seconds: float, implementation: str, cpu: str = "one") -> dict:
    entry = {"workload": "mlp", "implementation": implementation, "budget": None, "run": date}
    return {
        "machine": {"cpu": cpu},
        "runs": {date: {"gemm_rate": 1.0, "load": 0.0}},
        "entries": [entry | {"seconds": [seconds]}],
    }


def test_a_new_entry_replaces_the_old_one_and_leaves_the_others() -> None:
    first = merged(results("1", 1, "higher"), results("2", 2, "torch.func"))
    assert [entry["run"] for entry in first["entries"]] == ["2", "1"], "in the registry's order"
    again = merged(first, results("3", 3, "higher"))
    assert [entry["seconds"] for entry in again["entries"]] == [[2], [3]]
    assert sorted(again["runs"]) == ["2", "3"], "runs without an entry go"


def test_another_machine_starts_over() -> None:
    found = merged(results("1", 1, "higher"), results("2", 2, "torch.func", cpu="two"))
    assert [entry["implementation"] for entry in found["entries"]] == ["torch.func"]
    assert list(found["runs"]) == ["2"]
