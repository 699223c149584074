"""The repository's own shape: which way imports run, how long a module may be, what files may name.

Each check is a function from files to findings (`file:line: what`), so that its broken twin, a few
files in a temporary directory, goes through the same code as the repository.
"""

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "unrollc"

# The stages, as data flows through them: each may import from those before it and from itself.
# `__init__` is the package's face: it shows what `api` defines and nothing else.
STAGES = (
    "errors",
    "step",
    "capture",
    "requirements",
    "differentiate",
    "optimize",
    "plan",
    "codegen",
    "backends",
    "runtime",
    "report",
    "api",
    "__init__",
    "cli",
    "__main__",
)

LONGEST_MODULE = 450

# What would tie a file to one machine or to one tracker. Written so that no pattern matches itself.
FOREIGN = re.compile(
    r"(?<![\w.])/(?:work\b|tmp\b|home/|root/|opt/|mnt/|Users/)"  # a path of one machine
    r"|pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|file:/{3}"  # a package host
    r"|\b(?:issue|ticket) #?\d",  # a number that means nothing outside a tracker
    re.IGNORECASE,
)


# --- checks -----------------------------------------------------------------------------------


def imported_names(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import below `tree`, at any depth.

    `package` is where relative imports start: ("unrollc", "plan") for unrollc/plan/liveness.py.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = (node.module,) if node.module else ()
            for alias in node.names:
                yield node.lineno, ".".join((*base, *module, alias.name))


def stage_imported(name: str, package: str) -> str | None:
    """The stage that a dotted name belongs to; None outside the package."""
    top, _, rest = name.partition(".")
    if top != package:
        return None
    stage = rest.partition(".")[0]
    return stage if stage in STAGES else "__init__"


def upward_imports(package: Path) -> list[str]:
    """Every import in `package` of a stage that does not come before the importing one."""
    findings = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package.parent)
        stage = where.with_suffix("").parts[1]
        if stage not in STAGES:
            findings.append(
                f"{where}:1: {stage} is not a stage; the stages are {', '.join(STAGES)}"
            )
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(where))
        for line, name in imported_names(tree, where.parent.parts):
            target = stage_imported(name, package.name)
            if target is None or target == stage:
                continue
            if stage == "__init__" and target != "api":
                findings.append(f"{where}:{line}: the face may import api only, not {target}")
            elif STAGES.index(target) > STAGES.index(stage):
                findings.append(f"{where}:{line}: {stage} imports {target}, which comes after it")
    return findings


def overlong_modules(package: Path) -> list[str]:
    """Modules that have grown past the length at which a second subject is likely."""
    findings = []
    for path in sorted(package.rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST_MODULE:
            findings.append(f"{path.relative_to(package.parent)}:{lines}: {lines} lines")
    return findings


def foreign_mentions(files: Iterable[Path]) -> list[str]:
    """Lines of text files that mean something on one machine or in one tracker only."""
    findings = []
    for path in files:
        content = path.read_bytes()
        if b"\0" in content:  # an image, an archive: the test git itself uses
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
            if FOREIGN.search(line):
                findings.append(f"{path}:{number}: {line.strip()}")
    return findings


# --- the repository ---------------------------------------------------------------------------


def test_imports_run_one_way() -> None:
    assert list(PACKAGE.rglob("*.py")), f"no modules under {PACKAGE}"
    findings = upward_imports(PACKAGE)
    assert not findings, "\n".join(findings)


def test_modules_are_short() -> None:
    findings = overlong_modules(PACKAGE)
    assert not findings, "\n".join(findings)


def test_files_name_nothing_outside_the_project() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: git cannot say which files belong to the project")
    # New files count before they are added: that is when a stray path can still be taken out.
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    present = [path for path in files if path.is_file()]
    assert Path(__file__).resolve() in present
    findings = foreign_mentions(present)
    assert not findings, "\n".join(findings)


# --- broken twins -----------------------------------------------------------------------------


def package_of(directory: Path, modules: dict[str, str]) -> Path:
    """A package `unrollc` below `directory`, with the given sources by path."""
    package = directory / "unrollc"
    for name, source in modules.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    ("module", "source", "finding"),
    [
        (
            "plan/liveness.py",
            "import torch\nimport unrollc.codegen.names\n",
            "unrollc/plan/liveness.py:2: plan imports codegen, which comes after it",
        ),
        (
            "plan/liveness.py",
            "from unrollc import runtime\n",
            "unrollc/plan/liveness.py:1: plan imports runtime, which comes after it",
        ),
        (
            "capture/model/buffers.py",
            "from ...differentiate.rules import pullback\n",
            "unrollc/capture/model/buffers.py:1: capture imports differentiate, "
            "which comes after it",
        ),
        (
            "step.py",
            "def late():\n    from . import capture\n    return capture\n",
            "unrollc/step.py:2: step imports capture, which comes after it",
        ),
        (
            "errors.py",
            "import typing\nif typing.TYPE_CHECKING:\n    from .step import StepGraph\n",
            "unrollc/errors.py:3: errors imports step, which comes after it",
        ),
        (
            "differentiate/__init__.py",
            "from ..optimize import fold\n",
            "unrollc/differentiate/__init__.py:1: differentiate imports optimize, "
            "which comes after it",
        ),
        (
            "report/table.py",
            "from unrollc import __version__\n",
            "unrollc/report/table.py:1: report imports __init__, which comes after it",
        ),
        (
            "__init__.py",
            "from .errors import RequirementError\n",
            "unrollc/__init__.py:1: the face may import api only, not errors",
        ),
        (
            "helpers.py",
            "",
            f"unrollc/helpers.py:1: helpers is not a stage; the stages are {', '.join(STAGES)}",
        ),
    ],
)
def test_an_upward_import_is_caught(tmp_path: Path, module: str, source: str, finding: str) -> None:
    assert upward_imports(package_of(tmp_path, {module: source})) == [finding]


def test_downward_imports_pass(tmp_path: Path) -> None:
    package = package_of(
        tmp_path,
        {
            "__init__.py": "from .api import compile\n",
            "api.py": "import torch\nfrom unrollc.runtime import cache\nfrom . import errors\n",
            "plan/memory.py": "from .liveness import lifetimes\nfrom ..step import StepGraph\n",
            "cli.py": "import unrollc\nfrom unrollc import __version__, compile\n",
            "__main__.py": "from unrollc.cli import main\n",
        },
    )
    assert upward_imports(package) == []


def test_a_long_module_is_caught(tmp_path: Path) -> None:
    package = package_of(
        tmp_path,
        {
            "step.py": "x = 1\n" * LONGEST_MODULE,
            "plan/memory.py": "x = 1\n" * (LONGEST_MODULE + 1),
        },
    )
    assert overlong_modules(package) == [
        f"unrollc/plan/memory.py:{LONGEST_MODULE + 1}: {LONGEST_MODULE + 1} lines"
    ]


@pytest.mark.parametrize(
    "line",
    [
        f"figures go to {'/'.join(['', 'tmp', 'figures'])}",
        f"see `{'/'.join(['', 'work', 'notes'])}`",
        f"data = '{'/'.join(['', 'home', 'someone', 'data'])}'",
        f"pip install --index-url https://{'.'.join(['pypi', 'org'])}/simple",
        f"--find-links file:{'/' * 3}wheels",
        f"as asked in {' #'.join(['issue', '12'])}",
        f"as asked in {' '.join(['Issue', '12'])}",
    ],
)
def test_a_foreign_mention_is_caught(tmp_path: Path, line: str) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text(f"# Notes\n{line}\n", encoding="utf-8")
    assert foreign_mentions([notes]) == [f"{notes}:2: {line}"]


def test_ordinary_lines_and_images_pass(tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text(
        "#!/usr/bin/env bash\n"
        "the peak is read from /proc/self/status\n"
        "unrollc/work.py, examples/tmp/figure.png, ∂opt/∂θ\n"
        "an issue with 5 steps\n",
        encoding="utf-8",
    )
    image = tmp_path / "figure.png"
    image.write_bytes(b"\x89PNG\0" + "/".join(["", "tmp", "x"]).encode())
    assert foreign_mentions([notes, image]) == []
