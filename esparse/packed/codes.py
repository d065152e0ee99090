"""Numbers the choices of n out of m weights, and writes such numbers as a stream of bits.

The number of a choice is its place among itertools.combinations(range(m), n): 0 to C(m, n) - 1, so that 2:4 takes 3
bits, 4:8 takes 7 and 8:16 takes 14. The choice itself is a word: its bit i (of value 2^i) is 1 if weight i is kept.

Shapes: N groups, M weights of a group, B bytes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

LONGEST = 32  # largest m: int64 does not safely hold the numbers of larger groups
TABLED = 16  # largest m with a table of all words; in larger groups each number is computed


def code_bits(n: int, m: int) -> int:
    """The bits that a choice's number takes: ceil(log2 C(m, n)), computed exactly."""
    return (math.comb(m, n) - 1).bit_length()


def words(keep_NM: Tensor) -> Tensor:
    """The word (int64) of each boolean group."""
    words_N = torch.zeros(keep_NM.shape[0], dtype=_integer(keep_NM.shape[1]))
    for place in range(keep_NM.shape[1]):
        words_N |= keep_NM[:, place].to(words_N.dtype) << place
    return words_N.long()


def unworded(words_N: Tensor, m: int) -> Tensor:
    """The boolean group of each word: the inverse of `words`."""
    places_M = torch.arange(m, dtype=_integer(m))
    return ((words_N.to(places_M.dtype)[:, None] >> places_M) & 1).bool()


def numbers(words_N: Tensor, n: int, m: int) -> Tensor:
    """The number (int64) of each choice of n among m <= 32."""
    return _number_table(n, m)[words_N] if m <= TABLED else _counted(words_N, n, m)


def choices(numbers_N: Tensor, n: int, m: int) -> Tensor:
    """The word of each number; a number that stands for no choice gives a word without n ones."""
    return _word_table(n, m)[numbers_N] if m <= TABLED else _uncounted(numbers_N, n, m)


def to_bytes(numbers_N: Tensor, bits: int) -> Tensor:
    """Packs numbers of `bits` bits each into bytes (uint8), lowest bit first; zeros fill up the last byte.

    Eight numbers take `bits` bytes; a byte holds bits of one or more numbers.
    """
    count = len(numbers_N)
    eights_N8 = torch.nn.functional.pad(numbers_N, (0, -count % 8)).view(-1, 8)
    bytes_NB = torch.zeros(len(eights_N8), bits, dtype=torch.uint8, device=numbers_N.device)
    for number in range(8):
        for byte in range(number * bits // 8, -(-(number + 1) * bits // 8)):
            shift = 8 * byte - number * bits
            piece_N = eights_N8[:, number] >> shift if shift >= 0 else eights_N8[:, number] << -shift
            bytes_NB[:, byte] |= (piece_N & 255).to(torch.uint8)
    return bytes_NB.view(-1)[: -(-count * bits // 8)].clone()


def from_bytes(bytes_B: Tensor, count: int, bits: int) -> Tensor:
    """The numbers (int64) that `to_bytes` packed: its inverse."""
    bytes_NB = torch.nn.functional.pad(bytes_B, (0, -len(bytes_B) % bits if bits else 0)).view(-1, max(bits, 1))
    eights = len(bytes_NB) if bits else -(-count // 8)
    eights_N8 = torch.zeros(eights, 8, dtype=torch.int64, device=bytes_B.device)
    for number in range(8):
        for byte in range(number * bits // 8, -(-(number + 1) * bits // 8)):
            shift = 8 * byte - number * bits
            piece_N = bytes_NB[:, byte].long()
            eights_N8[:, number] |= piece_N << shift if shift >= 0 else piece_N >> -shift
    return (eights_N8 & ((1 << bits) - 1)).view(-1)[:count]


def _counted(words_N: Tensor, n: int, m: int) -> Tensor:
    numbers_N, left_N = torch.zeros_like(words_N), torch.full_like(words_N, n)
    for place in range(m):
        chosen_N = (words_N >> place) & 1
        # Choices with the same beginning: those with a weight at this place come before those without one.
        numbers_N += _ahead(place, n, m)[left_N] * (1 - chosen_N)
        left_N -= chosen_N
    return numbers_N


def _uncounted(numbers_N: Tensor, n: int, m: int) -> Tensor:
    rest_N, words_N, left_N = numbers_N.clone(), torch.zeros_like(numbers_N), torch.full_like(numbers_N, n)
    for place in range(m):
        ahead_N = _ahead(place, n, m)[left_N]
        chosen_N = rest_N < ahead_N
        words_N |= chosen_N.long() << place
        rest_N -= ahead_N.masked_fill_(chosen_N, 0)
        left_N -= chosen_N.long()
    return words_N


def _ahead(place: int, n: int, m: int) -> Tensor:
    """For each number of kept weights still to place: how many choices have a weight at `place`."""
    return torch.tensor([math.comb(m - 1 - place, left - 1) if left else 0 for left in range(n + 1)])


@lru_cache
def _word_table(n: int, m: int) -> Tensor:
    words_N = torch.zeros(1 << code_bits(n, m), dtype=torch.int64)  # numbers without a choice: the empty word
    words_N[: math.comb(m, n)] = _uncounted(torch.arange(math.comb(m, n)), n, m)
    return words_N


@lru_cache
def _number_table(n: int, m: int) -> Tensor:
    words_N = _word_table(n, m)[: math.comb(m, n)]
    numbers_N = torch.zeros(1 << m, dtype=torch.int64)
    numbers_N[words_N] = torch.arange(len(words_N))
    return numbers_N


def _integer(m: int) -> torch.dtype:
    return torch.int16 if m < 16 else torch.int32 if m < 32 else torch.int64
