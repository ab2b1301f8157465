"""The digest of a source, which names its store."""

from io import StringIO
from pathlib import Path

from orchestrator.data.manifest import PrepareOptions
from orchestrator.data.prepare.quarantine import Quarantine
from orchestrator.data.prepare.scan import scan


def test_the_digest_depends_on_names_and_texts_and_on_nothing_else(tmp_path: Path) -> None:
    def digest(case: str, files: dict[str, str]) -> str:
        folder = tmp_path / case
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        options = PrepareOptions(vocab_size=257, holdout=0.5, tokenizer_train_bytes=1)
        quarantine = Quarantine(StringIO(), folder)
        return scan([str(folder)], "text", options, quarantine, StringIO(), lambda fraction: None).digest

    first = digest("first", {"a.txt": "one", "b.txt": "two"})
    assert digest("same elsewhere", {"b.txt": "two", "a.txt": "one"}) == first
    assert digest("other text", {"a.txt": "one", "b.txt": "too"}) != first
    assert digest("other name", {"a.txt": "one", "c.txt": "two"}) != first
    assert digest("other border", {"a.txt": "onet", "b.txt": "wo"}) != first
