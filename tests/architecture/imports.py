"""What the package imports, read from its syntax trees: nothing is run, and imports inside functions count too."""

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """A module of the package. `imports` holds (dotted name, line) of modules of the package and of others."""

    name: str
    file: Path
    imports: tuple[tuple[str, int], ...]

    @property
    def room(self) -> str:
        """The part of the package it lies in: `elastic` for `orchestrator.elastic.world`, "" for the package itself."""
        return self.name.split(".")[1] if "." in self.name else ""


def read_package(folder: Path) -> dict[str, Module]:
    """All modules below `folder`, which is the package, by dotted name."""
    names = {_dotted(file, folder): file for file in sorted(folder.rglob("*.py"))}
    return {name: Module(name, file, tuple(_imports(file, names))) for name, file in names.items()}


def _dotted(file: Path, folder: Path) -> str:
    parts = file.relative_to(folder.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(file: Path, names: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write it out"
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in names else base, node.lineno)


def chain(modules: Mapping[str, Module], start: str, forbidden: Iterable[str]) -> tuple[str, ...] | None:
    """A way from module `start` to a forbidden package, through the package's own modules; None if there is none."""
    ways = [(start,)]
    seen = {start}
    while ways:
        way = ways.pop(0)
        for name, _ in modules[way[-1]].imports:
            if any(name == package or name.startswith(package + ".") for package in forbidden):
                return (*way, name)
            if name in modules and name not in seen:
                seen.add(name)
                ways.append((*way, name))
    return None


def cycle(modules: Mapping[str, Module]) -> tuple[str, ...] | None:
    """A cycle of imports, or None."""
    for start, module in modules.items():
        for name, _ in module.imports:
            back = chain(modules, name, [start]) if name in modules and name != start else None
            if back is not None and back[-1] == start:
                return (start, *back)
    return None


def folder_cycles(modules: Mapping[str, Module]) -> set[frozenset[str]]:
    """Pairs of folders of one room that reach each other by imports."""
    edges: dict[str, set[str]] = {}
    for module in modules.values():
        here = _folder_of(module)
        for name, _ in module.imports:
            if name in modules and modules[name].room == module.room and _folder_of(modules[name]) != here:
                edges.setdefault(here, set()).add(_folder_of(modules[name]))
    return {frozenset({a, b}) for a in edges for b in edges[a] if a in _reached(edges, b)}


def _folder_of(module: Module) -> str:
    return module.name if module.file.name == "__init__.py" else module.name.rpartition(".")[0]


def _reached(edges: Mapping[str, set[str]], start: str) -> set[str]:
    found, ways = set[str](), [start]
    while ways:
        new = edges.get(ways.pop(), set()) - found
        found |= new
        ways += new
    return found


def upward_imports(modules: Mapping[str, Module], level: Callable[[str], int]) -> Iterator[str]:
    """Imports of a room that doesn't lie below, as `file:line: from -> to`. `level` is 0 for the lowest room."""
    for module in modules.values():
        for name, line in module.imports:
            if name not in modules or modules[name].room == module.room:
                continue
            if level(modules[name].room) >= level(module.room):
                yield f"{module.file}:{line}: {module.name} -> {name}"
