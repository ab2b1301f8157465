"""Text generation, token by token."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from orchestrator.data.rows.chat_tokenizer import ChatPrompts
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import UsageError
from orchestrator.model.base import TrainableModel
from orchestrator.inference.sampling import next_token
from orchestrator.model.kv_cache import KVCache
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.protocol.child_process import Generation, GenerationResult, Remark, TextPiece
from orchestrator.spec.job import JobSpec
from orchestrator.user_code import calling_user


def generate(
    request: Generation,
    job: JobSpec,
    tokenizer: TextTokenizer,
    model: TrainableModel,
    chats: ChatPrompts | None = None,
) -> Iterator[TextPiece | Remark | GenerationResult]:
    """Yield pieces of the continuation as they are generated, then the result with all of it.

    Args:
        chats: of a run of chats: the prompt is then what the user says, and the continuation the answer.

    Raises:
        UsageError: the prompt has no tokens.
    """
    prompt = tokenizer.encode_prompt(request.prompt) if chats is None else chats.encode(request.prompt)
    ends = {tokenizer.document_token} if chats is None else chats.ends
    if not prompt:
        raise UsageError("the prompt is empty", remedy="Give it some text: --prompt TEXT, or --prompt - for stdin.")
    longest = len(prompt) + request.max_tokens
    if longest > (trained := job.train.sequence_length):
        yield Remark(
            f"The prompt's {len(prompt)} tokens and up to {request.max_tokens} more pass the {trained} that a row had "
            "in training: text beyond them may make no sense."
        )
    generator = torch.Generator().manual_seed(request.seed)
    continued = _continuation(model, longest)
    device = next(model.parameters()).device
    decode, tokens = tokenizer.stream(), list[int]()
    new_BT, ended = torch.tensor([prompt], device=device), False
    started_s = time.perf_counter()
    while len(tokens) < request.max_tokens and not ended:
        # Logits beyond the tokenizer's vocabulary are padding.
        logits_V = continued(new_BT)[0, : tokenizer.vocab_size].float().cpu()
        token = next_token(logits_V, request.temperature, request.top_k, request.top_p, generator)
        ended = token in ends
        if not ended:
            tokens.append(token)
            if text := decode(token):
                yield TextPiece(text)
            new_BT = torch.tensor([[token]], device=device)
    spent_s = time.perf_counter() - started_s
    yield GenerationResult(
        text=tokenizer.decode(tokens),
        tokens=tuple(tokens),
        prompt_tokens=len(prompt),
        ended=ended,
        tokens_per_second=len(tokens) / spent_s,
    )


def _continuation(model: TrainableModel, longest: int) -> Callable[[Tensor], Tensor]:
    """A function from the next tokens (1, T) to the logits (1, V) after them and all earlier tokens. Our own model
    caches keys and values; a user's model runs on the whole sequence each time."""
    if isinstance(model, MoELanguageModel):
        cache = KVCache(model.spec, 1, longest, model.head)
        return lambda new_BT: model.extend(new_BT, cache)
    seen_BT = torch.empty(1, 0, dtype=torch.int64, device=next(model.parameters()).device)

    @torch.no_grad()
    def rerun(new_BT: Tensor) -> Tensor:
        nonlocal seen_BT
        seen_BT = torch.cat((seen_BT, new_BT), dim=1)
        with calling_user(f"{model.spec.origin} on {seen_BT.shape[1]} tokens"):
            logits_BTV: Tensor = model(seen_BT)
        return logits_BTV[:, -1]

    return rerun
