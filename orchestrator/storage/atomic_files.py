"""Files that are replaced as a whole: a reader sees the old text or the new one."""

import os
from pathlib import Path

from orchestrator.storage.directory import flush_directory


def write_atomically(path: Path, text: str) -> None:
    """Replace a file and flush it to the device. Raises OSError; the old file is unchanged then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_directory(path.parent)
