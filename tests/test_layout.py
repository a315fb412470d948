"""The house: rooms in an order, imports towards the left only, no circles.

    files < chunk_causal kernels flow lora align dit ae toy < gpu < wan < families < sample
          < training < adapt experiments bench

Imports inside functions count as well. Only a command line may call later rooms, inside `main`.
"""
import ast
import graphlib

import pytest

from files import ROOT

ROOMS = [
    ["files"],
    ["chunk_causal", "kernels", "flow", "lora", "align", "dit", "ae", "toy"],
    ["gpu"],
    ["wan"],
    ["families"],
    ["sample"],
    ["training"],
    ["adapt", "experiments", "bench"],
]
HEIGHT = {room: height for height, rooms in enumerate(ROOMS) for room in rooms}


class Imports(ast.NodeVisitor):
    """What a file imports, but for what a function `main` does."""

    def __init__(self, path):
        self.found = set()
        self.visit(ast.parse(path.read_text()))

    def visit_FunctionDef(self, node):
        if node.name != "main":
            self.generic_visit(node)

    def visit_Import(self, node):
        self.found.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node):
        self.found.add(node.module)
        self.found.update(f"{node.module}.{alias.name}" for alias in node.names)


def arrows():
    """{file: files that it imports}, both as module names."""
    files = {}
    rooms = [path for name in HEIGHT for path in (ROOT / name).glob("*.py")]
    for path in (*ROOT.glob("*.py"), *rooms):
        if path.stem != "__init__":
            files[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return {name: Imports(path).found & files.keys() for name, path in files.items()}


def room(module):
    return module.split(".")[0]


@pytest.mark.core
def test_every_arrow_points_to_the_left():
    for a, wanted in arrows().items():
        for b in wanted:
            assert HEIGHT[room(b)] <= HEIGHT[room(a)], f"{a} may not import {b}"


@pytest.mark.core
def test_no_circles():
    graphlib.TopologicalSorter(arrows()).prepare()  # raises CycleError
