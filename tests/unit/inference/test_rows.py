"""A corpus as rows: each token once, and the same rows as a store's."""

from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.corpus.sources import Document, read_documents
from orchestrator.data.manifest import DOCUMENTS
from orchestrator.data.prepare.job_store import prepare
from orchestrator.data.store import IGNORED_TARGET
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.inference.rows import rows_of_documents

TEXTS = [f"document {n}: " + "words and more words " * n for n in range(1, 7)]
TOKENIZER = TextTokenizer.train(TEXTS, 270)


@pytest.mark.parametrize("length", [1, 7, 16, 10_000])
@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_every_token_of_a_text_is_a_target_once(length: int, rows_at_once: int) -> None:
    documents = [Document(str(number), text) for number, text in enumerate(TEXTS)]
    tokens = [token for document in TOKENIZER.encode(TEXTS) for token in document]
    inputs, targets = [], []
    for rows in rows_of_documents(documents, TOKENIZER, length, rows_at_once):
        assert rows.inputs_RT.shape == rows.targets_RT.shape == rows.documents_RT.shape
        assert rows.inputs_RT.shape[1] <= length
        inputs += rows.inputs_RT.flatten().tolist()
        targets += rows.targets_RT.flatten().tolist()
    assert inputs == tokens[:-1]
    wanted = [IGNORED_TARGET if token == TOKENIZER.document_token else token for token in tokens[1:]]
    assert targets == wanted


def test_rows_are_those_of_a_store(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    store = prepare(str(tmp_path / "texts"), 270, 0.3, tmp_path)
    names = [line.strip('"\n') for line in (store.directory / DOCUMENTS).read_text().splitlines()]
    held = [names[number] for number in store.index("train")["document"]]
    documents = [d for d in read_documents(str(tmp_path / "texts")) if d.id in held]
    count = store.num_rows("train", 8)
    wanted = store.rows("train", np.arange(count), 8)
    found = [r for r in rows_of_documents(documents, store.tokenizer(), 8, 5) if r.inputs_RT.shape[1] == 8]
    for name in ("inputs_RT", "targets_RT", "documents_RT"):
        np.testing.assert_array_equal(np.concatenate([getattr(r, name) for r in found]), getattr(wanted, name))
