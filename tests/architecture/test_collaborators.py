"""How many objects of our own classes an object of the central classes holds."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.imports import read_package

MOST = 6
CENTRAL = (
    "orchestrator.worker.trainer:Trainer",
    "orchestrator.worker.step.train_step:TrainStep",
    "orchestrator.controller.controller:RunController",
)

MODULES = read_package(Path(__file__).parents[2] / "orchestrator")
CLASSES = {
    node.name
    for module in MODULES.values()
    for node in ast.parse(module.file.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef)
}


def collaborators(tree: ast.Module, name: str, classes: set[str]) -> set[str]:
    """Attributes that the class's `__init__` sets to objects of these classes, which it is passed or constructs."""
    (of_class,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    (init,) = (node for node in of_class.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    ours = {arg.arg for arg in init.args.args if arg.annotation is not None and _named(arg.annotation) & classes}
    found = set()
    for target, value in _assignments(init):
        makes = any(isinstance(node, ast.Call) and _named(node.func) & classes for node in ast.walk(value))
        if not makes and not (isinstance(value, ast.Name) and value.id in ours):
            continue
        if isinstance(target, ast.Name):
            ours.add(target.id)
        elif isinstance(target, ast.Attribute):
            found.add(target.attr)
    return found


def _assignments(init: ast.FunctionDef) -> Iterator[tuple[ast.expr, ast.expr]]:
    for node in ast.walk(init):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.target, node.value
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=True)
            else:
                yield target, node.value


def _named(node: ast.expr) -> set[str]:
    names = (
        n.id if isinstance(n, ast.Name) else n.attr if isinstance(n, ast.Attribute) else "" for n in ast.walk(node)
    )
    return {name for name in names if name}


@pytest.mark.parametrize("place", CENTRAL)
def test_central_classes_have_few_collaborators(place: str) -> None:
    module, name = place.split(":")
    tree = ast.parse(MODULES[module].file.read_text(encoding="utf-8"))
    found = collaborators(tree, name, CLASSES)
    assert 0 < len(found) <= MOST, f"{place} holds {', '.join(sorted(found))}"


def test_collaborators_are_found() -> None:
    tree = ast.parse(
        "class Crowd:\n"
        "    def __init__(self, a: A, b: list[B], c: int, d: 'str | None') -> None:\n"
        "        self.a, self.count = a, c\n"
        "        self.made = pkg.C(c) if c else None\n"
        "        local = D()\n"
        "        self.kept: D = local\n"
        "        self.many = b\n"
        "        self.text = d\n"
        "        self.length = len(local.parts)\n"
    )
    assert collaborators(tree, "Crowd", {"A", "B", "C", "D"}) == {"a", "made", "kept", "many"}
