"""Own code comes from the job's directory: nothing that Python, its packages or another directory bring along."""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import user_code
from orchestrator.user_code import Elsewhere, imported, place_of


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(user_code, "_from", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def _write(path: Path, text: str = "def score(text): return 1.0\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("module", ["mine_a", "mine_p.inner", "mine_n.deep.inner"])
def test_an_existing_module_is_found_and_imported(tmp_path: Path, module: str) -> None:
    file = _write(tmp_path / f"{module.replace('.', '/')}.py")
    if module.startswith("mine_p"):
        _write(tmp_path / "mine_p" / "__init__.py", "")
    assert place_of(module, tmp_path) == file
    assert imported(module, tmp_path).score("") == 1.0


@pytest.mark.parametrize("module", ["os", "subprocess", "sys", "torch", "orchestrator.user_code", "no_such", "os.path"])
def test_what_python_brings_along_is_not(tmp_path: Path, module: str) -> None:
    for look in (place_of, imported):
        with pytest.raises(ModuleNotFoundError, match=f"No module named .* in {tmp_path}"):
            look(module, tmp_path)


@pytest.mark.parametrize(("kind", "module"), [("stdlib", "subprocess"), ("purelib", "pytest")])
def test_a_directory_of_python_is_not_the_users(kind: str, module: str) -> None:
    with pytest.raises(Elsewhere, match="belongs to Python or to an installed package"):
        place_of(module, Path(sysconfig.get_path(kind)))


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    outside = _write(tmp_path / "outside" / "mine_l.py")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "mine_l.py").symlink_to(outside)
    (tmp_path / "job" / "package").symlink_to(outside.parent)
    for module in ("mine_l", "package.mine_l"):
        with pytest.raises(Elsewhere, match=f"is a link to {outside}"):
            imported(module, tmp_path / "job")
    inside = _write(tmp_path / "job" / "real.py")
    (tmp_path / "job" / "mine_i.py").symlink_to(inside)
    assert imported("mine_i", tmp_path / "job").score("") == 1.0


def test_nothing_is_run_to_find_it(tmp_path: Path) -> None:
    _write(tmp_path / "mine_r" / "__init__.py", "raise SystemExit('ran')")
    _write(tmp_path / "mine_r" / "inner.py")
    assert place_of("mine_r.inner", tmp_path).name == "inner.py"


def test_a_module_name_that_python_uses_is_an_error(tmp_path: Path) -> None:
    _write(tmp_path / "json.py")
    with pytest.raises(Elsewhere, match="goes by this name already; rename yours"):
        imported("json", tmp_path)


def test_another_jobs_module_of_the_same_name_takes_its_place(tmp_path: Path) -> None:
    for job in ("one", "two"):
        _write(tmp_path / job / "mine_s" / "inner.py", f"WHO = {job!r}")
        module = imported("mine_s.inner", tmp_path / job)
        assert job == module.WHO
    assert str(tmp_path / "two") in sys.path and str(tmp_path / "one") not in sys.path
