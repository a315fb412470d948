"""README and docs: what they name is there, and the README stays short."""
import ast
import re

import pytest

from files import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#:]+)\)")
REFERENCE = re.compile(r"`([\w/]+\.py):([\w.]+)`")
PROGRAM = re.compile(r"^(?:torchrun \S+ \S+ |.*&& )?(?:python )?(-m [\w.]+|[\w/]+\.py)\b", re.M)


def names(path):
    """Functions and classes of a file, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        found.add(getattr(node, "name", None))
        inner = node.body if isinstance(node, ast.ClassDef) else ()
        found.update(f"{node.name}.{x.name}" for x in inner if isinstance(x, ast.FunctionDef))
    return found


@pytest.mark.core
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), target
    for file, name in REFERENCE.findall(text):
        path = ROOT / ("tests" if file.startswith("test_") else "") / file
        assert name in names(path), f"{file}:{name}"
    for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S):
        for program in PROGRAM.findall(block):
            file = program.removeprefix("-m ").replace(".", "/") if "-m" in program else program
            paths = ROOT / file, ROOT / f"{file}.py"
            assert file == "pytest" or any(path.exists() for path in paths), program


@pytest.mark.core
def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 14_000 and len(text.split()) <= 1_900
