"""The product stands alone: what only tests and benchmarks have, it never reaches."""

import pytest

from tests.architecture.imports import Module, chain
from tests.architecture.test_layers import MODULES


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.name)
def test_the_product_knows_no_tests(module: Module) -> None:
    """Above all no injected fault. Dotted names count too: hosts import classes that are named by a string."""
    assert chain(MODULES, module.name, ["tests", "benchmarks"]) is None
    text = module.file.read_text(encoding="utf-8")
    assert "tests.support" not in text and "benchmarks.support" not in text
