"""Journals of runs as their controllers would have left them."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.journal import read_events


def write_journal(run_dir: Path, events: Sequence[Mapping[str, Any]], term: int = 1) -> None:
    """A journal of one entry with these events, which have their stamps already."""
    seq = events[0].get("seq", 0) if events else 0
    entry = {"term": term, "prev": "", "nonce": "recorded", "seq": seq, "holder": {}, "events": list(events)}
    (run_dir / "journal").mkdir(parents=True)
    (run_dir / "journal" / "0000000000").write_text(json.dumps(entry))


def rewrite_journal(run_dir: Path, old: str, new: str) -> None:
    """Replace a text in all events of a run, in a journal whose chain is whole again."""
    events = json.loads(json.dumps(read_events(objects_at(run_dir))).replace(old, new))
    shutil.rmtree(run_dir / "journal")
    write_journal(run_dir, events, term=events[-1]["term"])
