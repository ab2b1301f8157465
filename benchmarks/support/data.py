"""The corpora that benchmarks train on: real text, prepared once per machine."""

import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.prepare.job_store import prepare
from orchestrator.data.store import TokenStore
from orchestrator.spec.data import DataSpec

QUICK_FILES = ("ast", "argparse", "datetime", "decimal", "difflib", "inspect", "pickle", "random", "tarfile", "typing")


def data_spec(quick: bool, workspace: Path) -> DataSpec:
    """Python's own library; for a smoke run a few of its files, copied into `workspace`."""
    if not quick:
        return DataSpec(source="builtin:stdlib", vocab_size=2048)
    folder = workspace / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    for name in QUICK_FILES:
        found = [path for path in (library / f"{name}.py", library / f"_py{name}.py") if path.exists()]
        if found:
            (folder / f"{name}.txt").write_text(found[0].read_text(encoding="utf-8"), encoding="utf-8")
    return DataSpec(source=str(folder), vocab_size=300, holdout=0.1)


def stores_dir(quick: bool, workspace: Path) -> Path:
    """Where stores lie. They are named by their content, so one that an earlier run left serves as well."""
    directory = workspace / "stores" if quick else Path(tempfile.gettempdir()) / "orchestrator-benchmarks"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def prepared(spec: DataSpec, directory: Path) -> TokenStore:
    return prepare(spec.source, spec.vocab_size, spec.holdout, directory)


@dataclass(frozen=True)
class Prepared:
    """A corpus as jobs name it, its store, and run storage in which the product finds that."""

    data: DataSpec
    store: TokenStore
    storage: Path


def prepared_storage(quick: bool, workspace: Path) -> Prepared:
    """Run storage in `workspace` whose runs have nothing to prepare."""
    data, stores = data_spec(quick, workspace), stores_dir(quick, workspace)
    store = prepared(data, stores)
    storage = workspace / "runs"
    storage.mkdir()
    (storage / ".data").symlink_to(stores)
    return Prepared(data, store, storage)
