"""The rooms of the package and the order of their imports, as facts."""

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.imports import Module, chain, cycle, folder_cycles, read_package, upward_imports

PACKAGE = Path(__file__).parents[2] / "orchestrator"
TESTS = Path(__file__).parents[1] / "unit"
# Test folders of what is no part of the package.
OUTSIDE = ("benchmarks", "chaos", "cluster_files", "dashboards", "docs")

# From the lowest to the highest. A room imports only rooms of lower lines; rooms of one line do not import each other.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"spec", "metrics", "secrets", "user_code", "storage"}),
    frozenset({"elastic", "sampling", "callback", "requirements", "code_archive"}),
    frozenset({"protocol", "code_package"}),
    frozenset({"policy"}),
    frozenset({"comm", "checkpoint", "tracking", "torch_process"}),
    frozenset({"data", "model", "state", "telemetry"}),
    frozenset({"engine", "inference"}),
    frozenset({"worker", "cluster", "run_records"}),
    frozenset({"controller"}),
    frozenset({"scheduler"}),
    frozenset({"submission", "callback_process"}),
    frozenset({"client"}),
    frozenset({"cli", "ray_train"}),
)
PURE = ("errors", "metrics", "spec", "elastic", "sampling", "protocol", "policy")
NO_TORCH = (
    *PURE,
    *(
        "callback",
        "requirements",
        "code_archive",
        "code_package",
        "torch_process",
        "storage",
        "data",
        "checkpoint",
        "tracking",
        "telemetry",
        "cluster",
        "run_records",
    ),
    *("controller", "scheduler", "submission", "callback_process", "client", "cli", "ray_train"),
)
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
LONG_FILE, LONGEST_FILE = 270, 400  # lines
MOST_FILES = 16  # of a folder
# Words of a private vocabulary that the field's terms have replaced: crew (worker group), slot (micro-batch), ward
# (protected rank), desk (mailbox), wish (request), seam (adapter), voice (ballot), witness (fingerprint), vault
# (snapshot store), shelf (a rank's snapshots), journey (exchange).
RETIRED = {
    *("crew", "slots", "ward", "desk", "wish", "wishes", "seam", "voice", "workshop", "teller", "bury"),
    *("witness", "witnesses", "vault", "shelf", "shelves", "journey"),
}

# Module names that occur in several rooms, each time for the same thing: its keys in a job file, its type, its rules.
# Commands are named by their verb, and events by their subject. `base` holds what the others of its folder implement.
SHARED_NAMES = {
    *("base", "curriculum", "data", "energy", "errors", "expert_load", "html", "manifest", "param_listing", "router"),
    *("progress", "report", "requests", "sample_order", "status", "tracking", "trainer", "user_code", "workers"),
    *("actors", "experts", "job", "model", "remote", "run", "task"),
}

MODULES = read_package(PACKAGE)


def level(room: str) -> int:
    """The line of LAYERS that a room stands in. The package's own `__init__` imports nothing by itself: below all."""
    return -1 if room == "" else next(i for i, rooms in enumerate(LAYERS) if room in rooms)


def modules_of(*rooms: str) -> list[Module]:
    return [module for module in MODULES.values() if module.room in rooms]


def names_in(module: Module) -> Iterator[str]:
    """Names of the classes, functions, parameters and attributes that a module defines or uses."""
    for node in ast.walk(ast.parse(module.file.read_text(encoding="utf-8"))):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.Attribute(attr=name) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name


def test_every_room_has_its_layer() -> None:
    known = frozenset().union(*LAYERS)
    assert {module.room for module in MODULES.values()} - {""} <= known


def test_imports_only_go_down() -> None:
    assert list(upward_imports(MODULES, level)) == []


def test_no_cycles() -> None:
    assert cycle(MODULES) is None


def test_no_cycles_of_folders_within_a_room() -> None:
    assert folder_cycles(MODULES) == set()


def test_module_names_occur_once() -> None:
    places: dict[str, list[str]] = {}
    for module in MODULES.values():
        if module.file.name != "__init__.py":
            places.setdefault(module.file.stem, []).append(module.name)
    assert {name for name, where in places.items() if len(where) > 1} == SHARED_NAMES


def test_unit_tests_mirror_the_package() -> None:
    folders = {file.parent.relative_to(TESTS) for file in TESTS.rglob("test_*.py")}
    inside = {folder for folder in folders if folder.parts[:1] not in {(other,) for other in OUTSIDE}}
    assert [str(folder) for folder in sorted(inside) if not (PACKAGE / folder).is_dir()] == []


@pytest.mark.parametrize("module", modules_of(*NO_TORCH), ids=lambda module: module.name)
def test_no_torch_reachable(module: Module) -> None:
    assert chain(MODULES, module.name, ["torch", "deepspeed", "safetensors.torch", "transformers"]) is None


@pytest.mark.parametrize("module", modules_of(*PURE), ids=lambda module: module.name)
def test_pure_rooms_reach_no_runtime(module: Module) -> None:
    assert chain(MODULES, module.name, ["ray", "mlflow", "torch", "deepspeed", "socket", "subprocess"]) is None


def test_only_the_engine_imports_deepspeed() -> None:
    importers = {m.room for m in MODULES.values() if any(name.split(".")[0] == "deepspeed" for name, _ in m.imports)}
    assert importers <= {"engine"}


def test_packages_without_torch_do_not_load_it() -> None:
    """What third parties import is not seen in our syntax trees: import everything for real."""
    names = [module.name for module in modules_of(*NO_TORCH)]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'deepspeed'} & sys.modules.keys()\n"
        "    if heavy: sys.exit(f'{name} loads {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *names], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ROOMS = sorted(set(PACKAGE.rglob("__init__.py")) - {PACKAGE / "__init__.py"})


@pytest.mark.parametrize("file", ROOMS, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_init_files_are_empty(file: Path) -> None:
    assert file.read_bytes() == b""


def test_module_names_are_not_vague() -> None:
    assert [module.name for module in MODULES.values() if VAGUE_NAMES & set(module.name.split("."))] == []


@pytest.mark.parametrize("folder", sorted({module.file.parent for module in MODULES.values()}), ids=str)
def test_folders_are_small(folder: Path) -> None:
    assert len([file for file in folder.glob("*.py") if file.name != "__init__.py"]) <= MOST_FILES


def test_public_classes_have_names_of_their_own() -> None:
    """Base classes of different packages may share one."""
    places: dict[str, list[str]] = {}
    for module in MODULES.values():
        for node in ast.parse(module.file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module.name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_names_are_free_of_retired_words() -> None:
    found = {
        f"{module.name}: {name}"
        for module in MODULES.values()
        for name in (*module.name.split("."), *names_in(module))
        if RETIRED & set(re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower().split("_"))
    }
    assert found == set()


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.name)
def test_files_are_one_sitting_long(module: Module) -> None:
    lines = len(module.file.read_text(encoding="utf-8").splitlines())
    if lines > LONG_FILE:
        warnings.warn(f"{module.name} has {lines} lines; {LONG_FILE} is one sitting", stacklevel=1)
    assert lines <= LONGEST_FILE


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.name)
def test_no_imports_for_types_only(module: Module) -> None:
    assert "TYPE_CHECKING" not in module.file.read_text(encoding="utf-8")
