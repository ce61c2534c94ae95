"""The package as a stranger gets it: one version, a wheel that holds everything, no heavy import, one gate."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import implicit_layers as il

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "implicit_layers").rglob("*.py"))
KERNEL_SOURCES = sorted((ROOT / "implicit_layers/csrc").iterdir())
EXTENSION = f"implicit_layers/_kernel{sysconfig.get_config_var('EXT_SUFFIX')}"
GATE = ["ruff format --check .", "ruff check .", "mypy", "lint-imports"]
TEST_COMMAND = "python -m pytest -n auto"
SLOW_COMMAND = "python -m pytest -n auto -m slow"


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def run(code: str, *, cwd: Path, path: Path, **names: str) -> str:
    """Run Python code in a new process that finds the package at `path`; its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(path), **names}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def build_wheel(source: Path, out: Path, **names: str) -> Path:
    """A wheel built from a copy of the files a clone has, so that nothing is left behind here."""
    for name in ["setup.py", "pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    shutil.copytree(ROOT / "implicit_layers", source / "implicit_layers", ignore=ignored)
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(out)!r})"
    run(build, cwd=source, path=source, **names)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled in full but without optimising, which is most of the time it takes and no part of what is in it."""
    compiler = tmp_path_factory.mktemp("compiler") / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n', encoding="utf-8")
    compiler.chmod(0o755)
    names = dict.fromkeys(("CC", "CXX"), shlex.quote(str(compiler)))
    return build_wheel(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel"), **names)


def test_one_version():
    assert re.search(r"^version: (.+)$", read("CITATION.cff"), re.M).group(1) == il.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", il.__version__)
    assert f"### {il.__version__}" in read("README.md").partition("## Changelog")[2]


def test_the_citation_names_the_package_and_its_authors():
    citation = read("CITATION.cff")
    assert "title: implicit_layers\n" in citation
    assert 'name: "The implicit_layers authors"' in citation
    assert "The implicit_layers authors" in read("LICENSE")


def test_the_wheel_holds_every_module_the_type_marker_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wheel.name.startswith(f"implicit_layers-{il.__version__}-")
    assert not wheel.name.endswith("-py3-none-any.whl")  # it may hold a compiled solver, which is one platform's
    assert "implicit_layers/py.typed" in names
    assert {path.relative_to(ROOT).as_posix() for path in [*SOURCES, *KERNEL_SOURCES]} <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_the_wheel_says_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        text = archive.read(metadata).decode()
    assert "Requires-Python: >=3.10" in text
    needed = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("Requires-Dist")]
    assert {re.split(r"[<>=!~; ]", line)[0] for line in needed if "extra ==" not in line} == {"torch", "numpy"}
    extras = {line.partition(": ")[2] for line in text.splitlines() if line.startswith("Provides-Extra")}
    assert extras == {"cvxpy", "examples", "bench", "notebooks", "test"}


def test_the_wheel_works_away_from_the_source(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = "import implicit_layers as il; print(il.__file__, il.__version__)"
    assert run(code, cwd=tmp_path, path=tmp_path / "installed") == (
        f"{tmp_path / 'installed' / 'implicit_layers' / '__init__.py'} {il.__version__}"
    )


SOLVE = (
    "import torch, implicit_layers as il; from implicit_layers.solvers import compiled; "
    "solution = il.solve_qp(torch.eye(2), -torch.ones(2), G=torch.eye(2), h=torch.zeros(2)); "
    "print(solution.lam.tolist(), compiled.description())"
)


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
def test_the_wheel_holds_the_compiled_solver_where_there_is_a_compiler(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        assert EXTENSION in archive.namelist()
        archive.extractall(tmp_path)
    assert re.fullmatch(r"\[1\.0, 1\.0\] \w+, \d programs side by side", run(SOLVE, cwd=tmp_path, path=tmp_path))


def test_without_a_compiler_the_package_is_built_and_works(tmp_path):
    for name in ("source", "wheel", "installed"):
        (tmp_path / name).mkdir()
    built = build_wheel(tmp_path / "source", tmp_path / "wheel", CC="false", CXX="false")
    with zipfile.ZipFile(built) as archive:
        assert EXTENSION not in archive.namelist()
        archive.extractall(tmp_path / "installed")
    alone = "import sys; sys.meta_path = [x for x in sys.meta_path if 'Editable' not in getattr(x, '__name__', '')]\n"
    said = run(alone + SOLVE, cwd=tmp_path, path=tmp_path / "installed")  # an editable install would lend its kernel
    assert said == "[1.0, 1.0] none: built without a C++ compiler"


def test_import_is_light(tmp_path):
    code = (
        "import sys, torch; before = set(sys.modules); import implicit_layers; new = set(sys.modules) - before; "
        "optional = {'cvxpy', 'sklearn', 'matplotlib', 'scipy', 'qpth', 'tqdm', 'pandas', 'IPython', 'pytest'}; "
        "print(sorted(new & optional))"
    )
    assert run(code, cwd=tmp_path, path=ROOT) == "[]"


def test_import_changes_no_global_setting(tmp_path):
    code = (
        "import torch, random; "
        "state = lambda: (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), "
        "torch.initial_seed(), torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32); "
        "before = state(); import implicit_layers; print(before == state())"
    )
    assert run(code, cwd=tmp_path, path=ROOT) == "True"


PUBLIC = {f"il.{name}": value for name, value in vars(il).items() if not name.startswith("_")}
PUBLIC = {name: value for name, value in PUBLIC.items() if not inspect.ismodule(value)}
MODULES = {
    f"il.nn.{name}": value
    for name, value in vars(importlib.import_module("implicit_layers.nn")).items()
    if inspect.isclass(value) and value.__module__.startswith("implicit_layers.nn.") and not name.startswith("_")
}


def test_the_first_file_lists_the_public_names_one_by_one_and_does_nothing_else():
    docstring, *statements = ast.parse(read("implicit_layers/__init__.py")).body
    assert isinstance(docstring, ast.Expr)
    for statement in statements:
        if isinstance(statement, ast.Assign):
            assert [target.id for target in statement.targets] == ["__version__"]
        else:
            assert isinstance(statement, ast.ImportFrom)
            assert all(name.asname == name.name for name in statement.names), ast.unparse(statement)


@pytest.mark.parametrize("name", {**PUBLIC, **MODULES})
def test_every_public_name_is_documented(name):
    value = {**PUBLIC, **MODULES}[name]
    text = value.__doc__ or ""
    assert text.strip(), f"{name} has no docstring"
    assert inspect.isfunction(value) <= all(part in text for part in ["Args:", "Returns:", ">>> "]), text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_says_what_it_is_and_stays_readable(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 600
    assert lines[0].startswith(('"""', 'r"""'))


@pytest.mark.parametrize("path", [".ci/run", ".pre-commit-config.yaml", ".github/workflows/tests.yml"])
def test_one_gate_is_called_from_everywhere(path):
    text = read(path)
    for command in GATE:
        assert re.search(rf"^\W*(?:run: |entry: |- run: )?{re.escape(command)}$", text, re.M), (path, command)


def test_contributors_run_the_same_gate():
    text = read(".github/CONTRIBUTING.md")
    for command in [*GATE, TEST_COMMAND, SLOW_COMMAND]:
        assert re.search(rf"^{re.escape(command)}(?:\s+#.*)?$", text, re.M), command
    assert len(text.splitlines()) <= 60


def test_the_slow_tests_run_in_ci():
    for path in [".ci/run", ".github/workflows/tests.yml"]:
        assert re.search(rf"^\W*(?:run: )?{re.escape(SLOW_COMMAND)}$", read(path), re.M), path


def test_ci_holds_torch_still_and_runs_the_readmes_line():
    script = read(".ci/run")
    assert "PIP_CONSTRAINT=.ci/constraints.txt" in script
    assert re.search(r"^torch==\d+\.\d+\.\d+$", read(".ci/constraints.txt"), re.M)
    pattern = re.search(r"grep -m 1 -E '(.+)' README\.md", script).group(1)
    lines = [line for line in read("README.md").splitlines() if re.search(pattern, line)]
    assert lines == [f'pip install -e ".[test]" && {TEST_COMMAND}']
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_workflow_tries_the_oldest_torch_that_setup_allows():
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', read("setup.py"))
    assert f'"torch=={oldest}.*"' in read(".github/workflows/tests.yml")
    (python,) = re.findall(r'python_requires=">=([\d.]+)"', read("setup.py"))
    assert f'python: ["{python}", ' in read(".github/workflows/tests.yml")
