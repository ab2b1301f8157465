"""Text from a model, token by token."""

import time
from collections.abc import Iterator

import torch

from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import UsageError
from orchestrator.model.cache import KVCache
from orchestrator.model.decoding import next_token
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.protocol.inference import Generation, GenerationResult, Piece, Remark
from orchestrator.spec.job import JobSpec


def generate(
    request: Generation, job: JobSpec, tokenizer: TextTokenizer, model: MoELanguageModel
) -> Iterator[Piece | Remark | GenerationResult]:
    """Pieces of the continuation as they come, and all of it at the end.

    Raises:
        UsageError: the prompt has no tokens.
    """
    prompt = tokenizer.encode_prompt(request.prompt)
    if not prompt:
        raise UsageError("the prompt is empty", remedy="Give it some text: --prompt TEXT, or --prompt - for stdin.")
    longest = len(prompt) + request.max_tokens
    if longest > (trained := job.train.sequence_length):
        yield Remark(
            f"The prompt's {len(prompt)} tokens and up to {request.max_tokens} more pass the {trained} that a row had "
            "in training: what comes after them may make no sense."
        )
    generator = torch.Generator().manual_seed(request.seed)
    cache = KVCache(job.model, 1, longest, model.head)
    decode, tokens = tokenizer.stream(), list[int]()
    new_BT, ended = torch.tensor([prompt], device=model.head.device), False
    started_s = time.perf_counter()
    while len(tokens) < request.max_tokens and not ended:
        # Of a vocabulary that is padded, the rows beyond the tokenizer's tokens mean nothing.
        logits_V = model.extend(new_BT, cache)[0, : tokenizer.vocab_size].float().cpu()
        token = next_token(logits_V, request.temperature, request.top_k, request.top_p, generator)
        ended = token == tokenizer.document_token
        if not ended:
            tokens.append(token)
            if text := decode(token):
                yield Piece(text)
            new_BT = torch.tensor([[token]], device=model.head.device)
    spent_s = time.perf_counter() - started_s
    yield GenerationResult(
        text=tokenizer.decode(tokens),
        tokens=tuple(tokens),
        prompt_tokens=len(prompt),
        ended=ended,
        tokens_per_second=len(tokens) / spent_s,
    )
