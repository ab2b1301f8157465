"""`eval` and `generate` on a run in storage: a process with torch, and Hugging Face's own answers to compare with."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.checkpoint.hf.export import export_hf
from orchestrator.checkpoint.manifest import checkpoint_name
from orchestrator.checkpoint.read import CheckpointReader, read_manifest
from orchestrator.cli.main import main
from orchestrator.data.store import TokenStore
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.errors import CheckpointCorrupt, DataError, OrchestratorError
from orchestrator.inference.generate import Prompt, generate
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.protocol.child_process import Evaluation, EvaluationResult, Generation, GenerationResult
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.events.base import plain_of
from orchestrator.protocol.events.training import CheckpointCommitted
from orchestrator.run_records.prepared_data import PreparedData
from orchestrator.spec.job import JobSpec
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal
from orchestrator.submission.model_process import ask_model, data_of
from tests.integration.test_glm4_moe import _checkpoint_of
from tests.support.texts import small_job

pytestmark = pytest.mark.usefixtures("forked_torch")

ROOT = Path(__file__).parents[2]
PROMPT = "def __init__(self, name):"
CHECKPOINT = checkpoint_name(7, 1, 0)
PADDING = 20  # rows of the vocabulary beyond the tokenizer's


@pytest.fixture(scope="module")
def run_dir(texts: Path, store_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of a random model with a padded vocabulary leaves: job, tokenizer, journal, checkpoint."""
    run_dir = tmp_path_factory.mktemp("runs") / "tried"
    run_dir.mkdir()
    store = TokenStore.open(store_dir)
    sizes = {
        "vocab_size": store.vocab_size + PADDING,
        "initializer_range": 0.2,
        "qk_norm": True,
        "num_hidden_layers": 3,
        "exits": {"layers": [1, 2]},
    }
    job = small_job(texts, model=sizes, sequence_length=32)
    model = _random(job)
    checkpoint = _checkpoint_of(model, run_dir / "checkpoints")
    (run_dir / "job.json").write_text(job.model_dump_json(by_alias=True))
    store.tokenizer().save(run_dir / "tokenizer.json")
    data = PreparedData(str(store_dir), store.vocab_size, str(run_dir / "tokenizer.json"))
    complete = CheckpointCommitted(7, str(checkpoint), 0, read_manifest(checkpoint).digest)
    Journal(DirectoryObjects(run_dir)).append([{"kind": "prepared", "data": to_plain(data)}, plain_of(complete)])
    return run_dir


@torch.no_grad()
def _random(job: JobSpec, document_logit: float = -9.0) -> MoELanguageModel:
    """Its first channel is constant: by it padding would win each choice if it could, and documents go on."""
    assert job.model.vocab_size is not None
    home = ExpertParallelContext(ExpertPlacement.balanced(job.model.n_routed_experts, 1), 0, None)
    model = MoELanguageModel(job.model, job.model.vocab_size, home)
    model.init_weights(5)
    for name, param in model.named_parameters():
        if name.endswith((".output", ".down")):
            param[0] = 0.0
    model.embedding.weight[:, 0] = 1.0
    model.head[:, 0] = 0.0
    model.head[-PADDING:, 0] = 9.0
    model.head[0, 0] = document_logit
    return model


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def orchestrator(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*args: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["orchestrator", *args, "--storage", str(run_dir.parent)])
        with pytest.raises(SystemExit) as end:
            main()
        return Done(int(end.value.code or 0), *capsys.readouterr())

    return run


def test_greedy_text_is_that_of_transformers(orchestrator: Callable[..., Done], run_dir: Path, tmp_path: Path) -> None:
    job = JobSpec.model_validate_json((run_dir / "job.json").read_text())
    export_hf(run_dir / "checkpoints" / CHECKPOINT, job, run_dir / "tokenizer.json", tmp_path / "hf", "fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    encoded = AutoTokenizer.from_pretrained(tmp_path / "hf")(PROMPT, return_tensors="pt")["input_ids"]
    known = TextTokenizer.load(run_dir / "tokenizer.json")
    padding = list(range(known.vocab_size, known.vocab_size + PADDING))
    settings = {"max_new_tokens": 40, "do_sample": False, "suppress_tokens": padding}
    wanted = theirs.generate(encoded, **settings)[0, encoded.shape[1] :].tolist()

    done = orchestrator(
        "model", "generate", "tried", "--prompt", PROMPT, "--max-tokens", "40", "--temperature", "0", "-o", "json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == wanted and len(wanted) == 40
    assert found["text"] == known.decode(found["tokens"])
    assert found["prompt_tokens"] == encoded.shape[1]
    assert f"pass the {job.train.sequence_length} of the model's context" in done.stderr


def test_an_export_keeps_the_precision_of_the_run_unless_another_is_named(
    orchestrator: Callable[..., Done], run_dir: Path, tmp_path: Path
) -> None:
    job = JobSpec.model_validate_json((run_dir / "job.json").read_text())
    assert job.train.precision == "fp32"
    done = orchestrator("model", "export", "tried", "--out", str(tmp_path / "kept"))
    assert done.returncode == 0 and "as fp32" in done.stderr
    assert (
        "as bf16"
        in orchestrator("model", "export", "tried", "--out", str(tmp_path / "named"), "--dtype", "bf16").stderr
    )
    rounded = job.model_copy(update={"train": job.train.model_copy(update={"precision": "bf16"})})
    export_hf(run_dir / "checkpoints" / CHECKPOINT, rounded, run_dir / "tokenizer.json", tmp_path / "rounded")
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("kept", "named", "rounded")
    ]
    kept, *others = [model.lm_head.weight for model in models]
    assert torch.equal(kept, _random(job).head)
    assert all(torch.equal(weight, kept.bfloat16()) for weight in others)


def test_a_text_ends_with_its_document(run_dir: Path) -> None:
    job = JobSpec.model_validate_json((run_dir / "job.json").read_text())
    tokenizer = TextTokenizer.load(run_dir / "tokenizer.json")
    request = Generation(str(run_dir), "", PROMPT, 5, 0.0, None, 1.0, 0)
    prompt = Prompt.of(PROMPT, job, tokenizer, None)
    (result,) = generate(request, job, tokenizer, _random(job, document_logit=9.0), prompt)
    assert isinstance(result, GenerationResult)
    assert (result.ended, result.tokens, result.text) == (True, (), "")


def test_a_seed_gives_the_same_text_again(orchestrator: Callable[..., Done]) -> None:
    once, again, other = (
        orchestrator("model", "generate", "tried", "--prompt", "import", "--max-tokens", "20", "--seed", seed).stdout
        for seed in ("1", "1", "2")
    )
    assert once == again != other


def test_the_loss_on_a_split_and_on_a_text_is_the_one_computed_by_hand(
    orchestrator: Callable[..., Done], run_dir: Path, store_dir: Path, tmp_path: Path
) -> None:
    job = JobSpec.model_validate_json((run_dir / "job.json").read_text())
    model, store = _random(job), TokenStore.open(store_dir)
    rows = store.rows("validation", np.arange(5), 32)
    with torch.no_grad():
        logits = model(torch.from_numpy(rows.inputs_RT))
    targets = torch.from_numpy(rows.targets_RT).flatten()
    wanted = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100).item()
    found = json.loads(orchestrator("model", "eval", "tried", "--max-rows", "5", "-o", "json").stdout)
    assert (found["rows"], found["units"]) == (5, int((targets != -100).sum()))
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)

    text = "a text of its own: größer als zuvor\n" * 9
    (tmp_path / "mine.jsonl").write_text(json.dumps({"body": text}) + "\n")
    [tokens] = store.tokenizer().encode([text])
    nats = 0.0
    for start in range(0, len(tokens) - 1, 32):
        row = torch.tensor(tokens[start : start + 33])
        with torch.no_grad():
            nats += F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum").item()
    options = ("--corpus", str(tmp_path / "mine.jsonl"), "--text-key", "body", "-o", "json")
    found = json.loads(orchestrator("model", "eval", "tried", *options).stdout)
    assert (found["units"], found["num_bytes"]) == (len(tokens) - 1, len(text.encode()))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_a_rule_lets_tokens_leave_early_at_little_loss(orchestrator: Callable[..., Done], run_dir: Path) -> None:
    early = ("model", "generate", "tried", "--prompt", PROMPT, "--temperature", "0", "--early-exit", "-o", "json")
    without = orchestrator(*early)
    assert without.returncode == 102 and "has no rule for its exits yet" in without.stderr

    some = ("model", "eval", "tried", "--max-rows", "200")
    plain = json.loads(orchestrator(*some, "-o", "json").stdout)
    assert plain["rows"] == 200 and plain["mean_layers"] is None
    assert plain["metrics"].keys() == {"exit_1_loss", "exit_2_loss"}
    strict, loose = (
        json.loads(orchestrator(*some, "--max-loss-increase", share, "-o", "json").stdout) for share in ("0", "0.02")
    )
    assert strict["rows"] == loose["rows"] == 100 and Path(loose["exit_rule"]).is_file()
    assert strict["loss_of_all_layers"] == loose["loss_of_all_layers"]
    assert loose["mean_layers"] < strict["mean_layers"] <= 3.0
    assert loose["loss"] < 1.04 * loose["loss_of_all_layers"]  # of other rows than those of the rule
    left = loose["metrics"]["exit_1_share"] + 2 * loose["metrics"]["exit_2_share"]
    assert left + 3 * (1 - loose["metrics"]["exit_1_share"] - loose["metrics"]["exit_2_share"]) == pytest.approx(
        loose["mean_layers"], abs=1e-4
    )

    kept = json.loads(orchestrator(*some, "--early-exit", "-o", "json").stdout)
    assert kept["rows"] == 200 and kept["exit_rule"] is None
    assert kept["loss_of_all_layers"] == pytest.approx(plain["loss"], rel=1e-6)
    assert kept["num_bytes"] == plain["num_bytes"] and loose["bits_per_byte"] is None
    assert kept["mean_layers"] == pytest.approx(loose["mean_layers"], abs=0.3)
    shown = orchestrator(*some, "--early-exit").stdout
    assert f"{kept['mean_layers']:.2f} of 3 per token" in shown
    made = json.loads(orchestrator(*early).stdout)
    assert len(made["tokens"]) == 100 and 1.0 <= made["mean_layers"] < 3.0
    rounded = orchestrator(*early, "--dtype", "int8", "--max-tokens", "8")
    assert json.loads(rounded.stdout)["mean_layers"] < 3.0
    assert "was fitted in fp32: in int8 the loss may rise more" in rounded.stderr


@pytest.mark.parametrize(
    ("args", "code", "rule"),
    [
        (("model", "eval", "tired"), 102, "Did you mean `tried`?"),
        (("model", "eval", "tried", "--step", "3"), 102, "it holds 7"),
        (("model", "eval", "tried", "--corpus", "/nowhere"), 2, "--corpus /nowhere doesn't exist"),
        (
            ("model", "eval", "tried", "--corpus", "x.txt", "--split", "train"),
            2,
            "--split selects from the run's own text",
        ),
        (("model", "eval", "tried", "--text-key", "body"), 2, "--text-key needs --corpus"),
        (("model", "generate", "tried", "--prompt", ""), 2, "the prompt is empty"),
        (("model", "generate", "tried", "--prompt", "a", "--top-p", "0"), 2, "--top-p is 0.0"),
        (("model", "generate", "tried", "--prompt", "import os\n" * 40), 2, "has 320 tokens, and the context of run"),
        (("model", "eval", "tried", "--early-exit", "--max-loss-increase", "0.1"), 2, "leave one out"),
        (("model", "eval", "tried", "--max-loss-increase", "0.1", "--max-rows", "1"), 2, "needs two rows"),
        (("model", "eval", "tried", "--max-loss-increase", "inf"), 2, "it must be a share"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_named(orchestrator: Callable[..., Done], args: tuple[str, ...], code: int, rule: str) -> None:
    done = orchestrator(*args)
    assert (done.returncode, done.stdout) == (code, "") and rule in done.stderr


def test_a_table_without_the_text_is_named_by_the_option(orchestrator: Callable[..., Done], tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "some.parquet")
    done = orchestrator("model", "eval", "tried", "--corpus", str(tmp_path / "some.parquet"))
    assert done.returncode == 2
    assert "has no 'text'; it has 'body'" in done.stderr and "--text-key" in done.stderr


def _ask(run_dir: Path, checkpoint: Path) -> EvaluationResult:
    (result,) = ask_model(Evaluation(str(run_dir), str(checkpoint), data_of("tried", run_dir).store_dir, max_rows=1))
    assert isinstance(result, EvaluationResult)
    return result


def test_another_models_checkpoint_and_another_tokenizers_store_are_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    checkpoint = run_dir / "checkpoints" / CHECKPOINT
    job = JobSpec.model_validate_json((run_dir / "job.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "journal").symlink_to(run_dir / "journal")
    narrow = job.model.model_copy(update={"moe_intermediate_size": 8})
    (other / "job.json").write_text(job.model_copy(update={"model": narrow}).model_dump_json(by_alias=True))
    (other / "tokenizer.json").write_bytes((run_dir / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointCorrupt, match="of another model or tokenizer.*it has"):
        _ask(other, checkpoint)
    (other / "job.json").write_text(job.model_dump_json(by_alias=True))
    TextTokenizer.train(["some other text"], 270).save(other / "tokenizer.json")
    with pytest.raises(DataError, match="are those of another tokenizer"):
        _ask(other, checkpoint)


def test_the_error_of_a_process_that_dies_has_its_last_output(run_dir: Path, tmp_path: Path) -> None:
    with CheckpointReader(run_dir / "checkpoints" / CHECKPOINT) as reader:
        reader.verify()
    shutil.copy(run_dir / "job.json", tmp_path)  # and nothing else of the run
    with pytest.raises(OrchestratorError, match=r"(?s)ended by itself \(1\).*FileNotFoundError"):
        list(ask_model(Evaluation(str(tmp_path), "no checkpoint", "no store")))


def test_ctrl_c_ends_the_text_and_the_process(run_dir: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "orchestrator.cli.main",
        "model",
        "generate",
        "tried",
        "--storage",
        str(run_dir.parent),
    ]
    process = subprocess.Popen(
        [*command, "--prompt", PROMPT, "--max-tokens", "100000"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # as from a terminal
    )
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=150)  # ends with the pipe's last writer
    assert process.returncode == 130
