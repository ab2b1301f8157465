"""No module but the inventory names kinds of the state: all others read the properties of its tensors."""

import ast
from collections.abc import Iterator

from orchestrator.elastic.state_spec import EMA, OF_RULE, ParamSpec
from orchestrator.spec.communication import CommunicationSpec, CompressionSpec
from tests.architecture.test_layers import MODULES
from tests.support.layouts import state_of

NAMING = {
    "orchestrator.elastic.state_spec",
    "orchestrator.spec.communication",  # checkpoints record what compression keeps
}


def _kinds() -> set[str]:
    """Of all that a state may consist of."""
    found = set()
    for compression in (CompressionSpec(scheme="topk", momentum=0.9), CompressionSpec(scheme="powersgd")):
        communication = CommunicationSpec(compression=compression)
        tensors = state_of([ParamSpec("matrix", (64, 64), None)], True, [("bias", (4,))], communication)
        tensors |= dict.fromkeys(f"{kind}/matrix" for kinds in OF_RULE.values() for kind in (*kinds, EMA))
        found |= {name.partition("/")[0] for name in tensors}
    return found


KINDS = _kinds()
OTHERWISE = {"powersgd", "ema"}  # names of a scheme and of an option as well


def _named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of literal texts, parts of others included, that name a kind, or a tensor by `KIND/`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            kind, slash, _ = node.value.partition("/")
            if kind in KINDS and (slash or kind not in OTHERWISE):
                yield node.lineno, node.value


def test_literal_kinds_are_found() -> None:
    assert {"param", "master", "exp_avg", "buffer", "residual", "velocity", "powersgd"} <= KINDS
    source = (
        'a = "master"\nb = f"exp_avg_sq/{a}"\nc = name.startswith("powersgd/")\nd = "powersgd", "masters", "a buffer"'
    )
    assert list(_named(ast.parse(source))) == [(1, "master"), (2, "exp_avg_sq/"), (3, "powersgd/")]


def test_no_other_module_names_kinds_of_state() -> None:
    """They read a property of `StateTensor`, or use a constant of the inventory where they provide its tensors."""
    named = {name: list(_named(ast.parse(module.file.read_text("utf-8")))) for name, module in MODULES.items()}
    assert {name: found for name, found in named.items() if found and name not in NAMING} == {}
    assert all(named[name] for name in NAMING)
