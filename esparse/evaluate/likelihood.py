"""The log-likelihood of given continuations (such as the answers of a multiple-choice task), one block at a time.

Shapes: B inputs of a bucket, L tokens of each, T tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from esparse.models import host_memory
from esparse.models.activations import Activations
from esparse.models.blocks import BlockModel
from esparse.models.damage import of_ends

Tokens = tuple[int, ...]
BUCKET = 16  # inputs are padded to a multiple of this many tokens


@torch.no_grad()
def log_likelihoods(
    blocks: BlockModel,
    requests: Sequence[tuple[Tokens, Tokens]],
    on_block: Callable[[int], None] = lambda index: None,
) -> list[tuple[float, bool]]:
    """For each (input, continuation): the sum of the continuation's log-probabilities (nats), and whether it is greedy.

    The input ends with the continuation without its last token, so the logits at the last T positions predict the T
    continuation tokens. Equal inputs (answers of one token) are computed once. Inputs of similar length go through the
    blocks together, padded at the end, which a causal model does not see. A pass over the blocks takes as many inputs
    as have their hidden states fit into a quarter of the free memory. Ranks share the inputs, and all get all results.
    Raises Mistake if a log-probability is NaN or Inf.
    """
    wanted: dict[Tokens, list[int]] = {}
    for index, (inputs, _) in enumerate(requests):
        wanted.setdefault(inputs, []).append(index)
    longest_first = sorted(wanted, key=lambda inputs: (-len(inputs), inputs))
    ranks = blocks.ranks
    found: dict[int, tuple[float, bool]] = {}
    for chunk in _chunks(longest_first[ranks.rank :: ranks.size], _room(blocks)):
        longest = {inputs: max(len(requests[index][1]) for index in wanted[inputs]) for inputs in chunk}
        for inputs, logits_TV in _logits(blocks, longest, on_block):
            for index in wanted[inputs]:
                found[index] = _log_likelihood(logits_TV, requests[index][1])
    for other in ranks.gather(found):
        found |= other
    if not all(math.isfinite(value) for value, _ in found.values()):
        raise of_ends(blocks, "the likelihood of an answer is not a finite number: the model's logits hold NaN or Inf")
    return [found[index] for index in range(len(requests))]


def _logits(
    blocks: BlockModel, longest: Mapping[Tokens, int], on_block: Callable[[int], None]
) -> Iterator[tuple[Tokens, Tensor]]:
    """The inputs of one pass over the blocks, each with the logits_TV of its last tokens.

    `longest` has the inputs, and of how many tokens the longest continuation of each is; T is at least that.
    """
    buckets = [list(same) for _, same in groupby(longest, key=_padded)]
    tokens = [torch.tensor([[*inputs, *[0] * (_padded(inputs) - len(inputs))] for inputs in b]) for b in buckets]
    streams = [Activations(blocks, tokens_BL) for tokens_BL in tokens]
    for index in range(len(blocks.blocks)):
        with blocks.resident(index):
            for stream in streams:
                stream.advance(index)
        on_block(index)
    with blocks.ends_resident():
        for bucket, tokens_BL, stream in zip(buckets, tokens, streams, strict=True):
            first = 0
            for batch, ids_BL in enumerate(blocks.micro_batches(tokens_BL)):
                together = bucket[first : first + len(ids_BL)]
                first += len(ids_BL)
                yield from zip(together, stream.logits_at(batch, ids_BL, _last_tokens(together, longest)), strict=True)


def _last_tokens(together: Sequence[Tokens], longest: Mapping[Tokens, int]) -> Tensor:
    """The positions (B x T) of each input's last tokens; a short input repeats its first one, which nobody reads."""
    size = max(longest[inputs] for inputs in together)
    end_B = torch.tensor([len(inputs) for inputs in together])
    return (end_B[:, None] + torch.arange(-size, 0)).clamp_min(0)


def _log_likelihood(logits_TV: Tensor, continuation: Tokens) -> tuple[float, bool]:
    # Converts only the continuation's logits to float32, because a large vocabulary takes much memory.
    logits_TV = logits_TV[-len(continuation) :].float()
    target_T = torch.tensor(continuation, device=logits_TV.device)
    log_p_T = logits_TV.log_softmax(-1).gather(-1, target_T[:, None])
    return float(log_p_T.double().sum()), bool((logits_TV.argmax(-1) == target_T).all())


def _padded(inputs: Tokens) -> int:
    return -(-len(inputs) // BUCKET) * BUCKET


def _chunks(inputs: Sequence[Tokens], most_tokens: int) -> Iterator[Sequence[Tokens]]:
    """Cuts the inputs into chunks of at most this many tokens, and at least one input."""
    first, tokens = 0, 0
    for index, one in enumerate(inputs):
        tokens += _padded(one)
        if tokens > most_tokens and index > first:
            yield inputs[first:index]
            first, tokens = index, _padded(one)
    if first < len(inputs):
        yield inputs[first:]


def _room(blocks: BlockModel) -> int:
    """The number of tokens whose hidden states take a quarter of the free memory of their store."""
    config = blocks.model.config.get_text_config()
    device = blocks.device if blocks.hidden_store.place == "device" else torch.device("cpu")
    return int(
        host_memory.free_bytes(device) // 4 // blocks.ranks.size // (config.hidden_size * blocks.model.dtype.itemsize)
    )
