"""Text generation, token by token."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.checkpoint.hf.export import INTEGERS
from orchestrator.data.rows.chat_tokenizer import ChatPrompts
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import UsageError
from orchestrator.inference.exit_rule import LayerCount
from orchestrator.inference.sampling import next_token
from orchestrator.model.attention.kv_cache import KVCache
from orchestrator.model.base import TrainableModel
from orchestrator.model.compiled import compile_parts, compiler_of, try_compiler
from orchestrator.model.early_exit import EarlyExit, ExitRule
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.protocol.child_process import Generation, GenerationResult, Remark, TextPiece
from orchestrator.spec.job import JobSpec
from orchestrator.user_code import calling_user


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, and those that end the text."""

    tokens: tuple[int, ...]
    ends: frozenset[int]

    @classmethod
    def of(cls, text: str, job: JobSpec, tokenizer: TextTokenizer, chats: ChatPrompts | None) -> "Prompt":
        """A text's tokens.

        Args:
            chats: of a run of chats: the text is then what the user says, and the continuation the answer.

        Raises:
            UsageError: there are none, or more than the model's context.
        """
        tokens = tokenizer.encode_prompt(text) if chats is None else chats.encode(text)
        if not tokens:
            raise UsageError("the prompt is empty", remedy="Give it some text: --prompt TEXT, or --prompt - for stdin.")
        known = known_context(job)
        if known is not None and len(tokens) > known:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens, and the context of run {job.name} {known}",
                remedy="Shorten the prompt, or train with a larger train.sequence_length.",
            )
        ends = {tokenizer.document_token} if chats is None else chats.ends
        return cls(tuple(tokens), frozenset(ends))


def trained_length(job: JobSpec) -> int:
    """Tokens of the longest row in training."""
    stages = job.curriculum.stages if job.curriculum else ()
    return max(job.train.sequence_length, *(stage.sequence_length or 0 for stage in stages), 0)


def known_context(job: JobSpec) -> int | None:
    """Tokens up to which a model was trained, also before the run, if that is known; it isn't of a user's own model,
    nor where the files that a run began from are gone or don't tell."""
    if job.model.entrypoint is not None:
        return None
    keys = dict(job.model.config)
    if job.model.init_from is not None:
        with suppress(OSError, ValueError):
            keys |= json.loads((Path(job.model.init_from) / "config.json").read_text())
    elif job.model.is_native:
        return trained_length(job)
    known = [value for name in ("max_position_embeddings", "n_positions") if isinstance(value := keys.get(name), int)]
    return max(trained_length(job), *known) if known else None


def refuse_compiling(job: JobSpec, dtype: str) -> None:
    """Raise UsageError if a run's model isn't ours, if it rounds as in its training, if its layers differ, or if this
    machine has no compiler."""
    if not job.model.is_native:
        raise UsageError(
            f"--compile compiles layers of our own model, and run {job.name} has one of {job.model.origin}",
            remedy="Leave --compile out.",
        )
    if job.train.quantization is not None and dtype not in INTEGERS:
        trained = job.train.quantization.weight_dtype
        raise UsageError(
            f"--compile can't compile the rounding for {trained} with which run {job.name} computes in {dtype}",
            remedy=f"Add --dtype {trained}, or leave --compile out.",
        )
    if job.train.prunes_units:
        raise UsageError(
            f"--compile would compile each layer apart: those of run {job.name} have lost neurons or heads",
            remedy="Leave --compile out.",
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiler_of(device)
    try_compiler(device)


def generate(
    request: Generation,
    job: JobSpec,
    tokenizer: TextTokenizer,
    model: TrainableModel,
    prompt: Prompt,
    rule: ExitRule | None = None,
) -> Iterator[TextPiece | Remark | GenerationResult]:
    """Yield pieces of the continuation as they are generated, then the result with all of it.

    Args:
        rule: by which tokens leave at exits, but for those of the prompt. None: all run all layers.
    """
    longest = len(prompt.tokens) + request.max_tokens
    context = known_context(job) or trained_length(job)
    if longest > context:
        yield Remark(
            f"The prompt's {len(prompt.tokens)} tokens and up to {request.max_tokens} more pass the {context} of the "
            "model's context: text beyond them may make no sense."
        )
    generator = torch.Generator().manual_seed(request.seed)
    count = LayerCount()
    continued = _continuation(model, longest, rule, count)
    device = next(model.parameters()).device
    decode, tokens = tokenizer.stream(), list[int]()
    new_BT, ended = torch.tensor([prompt.tokens], device=device), False
    started_s, paused_s = time.perf_counter(), 0.0
    while len(tokens) < request.max_tokens and not ended:
        # Logits beyond the tokenizer's vocabulary are padding.
        logits_V = continued(new_BT)[0, : tokenizer.vocab_size].float().cpu()
        if request.compiled and not tokens and request.max_tokens > 1 and isinstance(model, MoELanguageModel):
            yield Remark("Compiling ...")
            paused_s = _compile(model)
            yield Remark(f"Compiled in {paused_s:.1f} s.")
        token = next_token(logits_V, request.temperature, request.top_k, request.top_p, generator)
        ended = token in prompt.ends
        if not ended:
            tokens.append(token)
            if text := decode(token):
                yield TextPiece(text)
            new_BT = torch.tensor([[token]], device=device)
    spent_s = time.perf_counter() - started_s - paused_s
    yield GenerationResult(
        text=tokenizer.decode(tokens),
        tokens=tuple(tokens),
        prompt_tokens=len(prompt.tokens),
        ended=ended,
        tokens_per_second=len(tokens) / spent_s,
        mean_layers=count.mean,
    )


@torch.no_grad()
def _compile(model: MoELanguageModel) -> float:
    """Have the layers compute single tokens compiled. Returns the seconds that it took."""
    began_s = time.perf_counter()
    compile_parts(model)
    token_BT = torch.zeros(1, 1, dtype=torch.int64, device=model.head.device)
    model.extend(token_BT, KVCache(model.spec, 1, 1, model.head))
    return time.perf_counter() - began_s


def _continuation(
    model: TrainableModel, longest: int, rule: ExitRule | None, count: LayerCount
) -> Callable[[Tensor], Tensor]:
    """A function from the next tokens (1, T) to the logits (1, V) after them and all earlier tokens. Our own model
    caches keys and values; a user's model runs on the whole sequence each time. With a rule of exits, the layers that
    tokens run are counted."""
    if isinstance(model, MoELanguageModel):
        cache = KVCache(model.spec, 1, longest, model.head)
        if rule is None:
            return lambda new_BT: model.extend(new_BT, cache)
        early = EarlyExit(model, rule)

        def extend(new_BT: Tensor) -> Tensor:
            if cache.length == 0:
                return early.begin(new_BT, cache)
            logits_BV, layers_B = early.extend(new_BT, cache)
            count.add(int(layers_B[0]))
            return logits_BV

        return extend
    seen_BT = torch.empty(1, 0, dtype=torch.int64, device=next(model.parameters()).device)

    @torch.no_grad()
    def rerun(new_BT: Tensor) -> Tensor:
        nonlocal seen_BT
        seen_BT = torch.cat((seen_BT, new_BT), dim=1)
        with calling_user(f"{model.spec.origin} on {seen_BT.shape[1]} tokens"):
            logits_BTV: Tensor = model(seen_BT)
        return logits_BTV[:, -1]

    return rerun
