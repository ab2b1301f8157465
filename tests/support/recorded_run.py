"""Journals of runs as their controllers would have left them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_journal(run_dir: Path, events: Sequence[Mapping[str, Any]], term: int = 1) -> None:
    """A journal of one entry with these events, which have their stamps already."""
    seq = events[0].get("seq", 0) if events else 0
    entry = {"term": term, "prev": "", "nonce": "recorded", "seq": seq, "holder": "", "events": list(events)}
    (run_dir / "journal").mkdir(parents=True)
    (run_dir / "journal" / "0000000000").write_text(json.dumps(entry))
