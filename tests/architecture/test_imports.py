"""The reader of imports finds what it should: the other tests of this folder stand on it."""

from pathlib import Path

import pytest

from tests.architecture.imports import Module, chain, cycle, folder_cycles, read_package, upward_imports

LEVELS = {"": 0, "low": 0, "beside": 0, "high": 1}


@pytest.fixture
def package(tmp_path: Path) -> dict[str, Module]:
    files = {
        "__init__.py": "",
        "low/__init__.py": "",
        "low/a.py": "import torch.nn\n",
        "low/b.py": "from pkg.low import a\n",
        "beside/__init__.py": "",
        "beside/c.py": "from pkg.low.b import x\n",
        "high/__init__.py": "",
        "high/d.py": "def f():\n    from pkg.low import b\n    import pkg.high.e\n",
        "high/e.py": "from pkg.high.d import f\nimport torchvision\n",
    }
    for name, text in files.items():
        file = tmp_path / "pkg" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return read_package(tmp_path / "pkg")


def test_imports_are_read(package: dict[str, Module]) -> None:
    assert package["pkg.low.a"].imports == (("torch.nn", 1),)
    assert package["pkg.low.b"].imports == (("pkg.low.a", 1),)
    assert package["pkg.high.d"].imports == (("pkg.low.b", 2), ("pkg.high.e", 3))
    assert package["pkg.high.d"].room == "high"
    assert package["pkg"].room == ""


def test_chain_goes_through_modules_and_functions(package: dict[str, Module]) -> None:
    assert chain(package, "pkg.high.d", ["torch"]) == ("pkg.high.d", "pkg.low.b", "pkg.low.a", "torch.nn")
    assert chain(package, "pkg.high.e", ["vision"]) is None


def test_cycle(package: dict[str, Module]) -> None:
    found = cycle(package)
    assert found is not None
    assert set(found) == {"pkg.high.d", "pkg.high.e"}
    assert cycle({name: m for name, m in package.items() if m.room != "high"}) is None


def test_cycles_of_folders(tmp_path: Path) -> None:
    files = {"a/x.py": "from pkg.room.b import y\n", "b/y.py": "", "b/z.py": "import pkg.room.a.x\n", "c/w.py": ""}
    for name, text in files.items():
        file = tmp_path / "pkg" / "room" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert folder_cycles(read_package(tmp_path / "pkg")) == {frozenset({"pkg.room.a", "pkg.room.b"})}


def test_upward_imports(package: dict[str, Module]) -> None:
    (found,) = upward_imports(package, LEVELS.__getitem__)
    assert found.endswith("c.py:1: pkg.beside.c -> pkg.low.b")


def test_relative_imports_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "a.py").write_text("from . import b\n")
    with pytest.raises(AssertionError, match="relative import"):
        read_package(tmp_path / "pkg")
