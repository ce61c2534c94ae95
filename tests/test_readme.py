"""The README is true: its code runs, its commands are those of setup.py and .ci/run, its links lead somewhere."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

import pytest

import implicit_layers as il

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line]
MARKED_TABLES = ["qp", "qp-accuracy", "memory", "simplex", "scaling"]


def test_the_python_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert PYTHON
    namespace = {"__name__": "readme"}
    for number, code in enumerate(PYTHON, start=1):
        exec(compile(code, f"README.md, python block {number}", "exec"), namespace)


def test_the_first_example_is_short():
    assert len(PYTHON[0].splitlines()) <= 12


def test_there_are_two_commands_to_install_and_run():
    installing = [line for line in COMMANDS if line.startswith("pip install -e")]
    assert installing == [
        'pip install -e ".[examples]" && python -m implicit_layers',
        'pip install -e ".[test]" && python -m pytest -n auto',
    ]


def test_every_extra_that_is_named_exists():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = set(re.findall(r'^        "(\w+)": [A-Z]+,$', setup, re.M))
    named = {extra for group in re.findall(r"\.\[([\w,]+)\]", README) for extra in group.split(",")}
    assert extras == {"cvxpy", "examples", "bench", "notebooks", "test"}
    assert named and named <= extras


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\bil\.((?:nn\.|testing\.|projections\.)?\w+)", README))))
def test_every_public_name_that_is_named_exists(name):
    assert callable(attrgetter(name)(il)) or name in ("nn", "testing", "projections")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", README))))
def test_every_relative_link_leads_to_a_file(target):
    assert (ROOT / target).exists()


def test_every_link_inside_the_page_leads_to_a_heading():
    headings = re.findall(r"^#+ (.+)$", README, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_every_file_of_the_map_exists_and_every_room_is_on_it():
    (drawn,) = re.findall(r"## Map of the code\n.*?```text\n(.*?)```", README, re.S)
    drawn_paths = set(re.findall(r"^ *(\S+?)/? {2,}", drawn, re.M))
    package = ROOT / "implicit_layers"
    rooms = {
        path.name
        for path in package.iterdir()
        if path.name != "__pycache__" and (path.is_dir() or path.suffix == ".py")
    }
    assert rooms <= drawn_paths, f"not on the map: {sorted(rooms - drawn_paths)}"
    gone = {name for name in drawn_paths if not (package / name).exists() and not (ROOT / name).exists()}
    assert not gone, f"on the map but not there: {sorted(gone)}"


@pytest.mark.parametrize("name", MARKED_TABLES)
def test_each_table_has_its_place(name):
    assert README.count(f"<!-- table:{name} -->") == 1
    assert README.count(f"<!-- /table:{name} -->") == 1
    assert README.index(f"<!-- table:{name} -->") < README.index(f"<!-- /table:{name} -->")


def test_lines_of_prose_stay_readable():
    prose = [line for line in README.splitlines() if not line.startswith("|")]  # tables are made by scripts
    assert len(prose) <= 400
