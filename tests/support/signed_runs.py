"""Runs whose journals are signed, and files of keys."""

from pathlib import Path

from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.signed_objects import SigningKey
from orchestrator.storage.backends.signing_keys import run_objects
from orchestrator.storage.journal import Journal

SECRET = "a key that only we have"


def key_file(path: Path, text: str = SECRET, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def run_of(storage: Path, reference: str | None, key: SigningKey | None) -> Path:
    """A run that was submitted with this reference, and whose journal was signed with this key."""
    run_dir = storage / "demo"
    run_dir.mkdir(parents=True)
    job = JobSpec.model_validate({"name": "demo", "signing_key": reference})
    (run_dir / "job.json").write_text(job.model_dump_json(by_alias=True))
    Journal(run_objects(run_dir, key=key)).append([{"kind": "storage_works"}])
    return run_dir
