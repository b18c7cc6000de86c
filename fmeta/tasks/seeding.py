"""One random generator for each (seed, step), so that samplers have no state."""

from __future__ import annotations

import operator

import torch

WORD = 2**32
MASK64 = 2**64 - 1


def generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator that depends on ``(seed, step)`` and nothing else.

    torch seeds its CPU generator with the low 32 bits of a seed only, so hashing the pair would let two of
    60,000 steps collide once in three runs. Here the seed picks one of many permutations of the 32-bit
    numbers, and the step is permuted: steps of one seed never collide.

    Args:
        seed: any int, of which 64 bits count.
        step: an int in ``0 .. 2**32 - 1``; a tensor with one integer will do.
    """
    seed, step = _integer(seed, "seed"), _integer(step, "step")
    if not 0 <= step < WORD:
        raise ValueError(f"sampler: step must be in 0 .. 2**32 - 1, got {step}. Count the steps from 0.")
    key = splitmix64(seed)
    state = _mix32(step ^ (key % WORD))
    return torch.Generator().manual_seed(_mix32(state ^ (key >> 32)))


def splitmix64(number: int) -> int:
    """Mix 64 bits (Steele, Lea, Flood, Fast splittable pseudorandom number generators, 2014)."""
    z = (number + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def _mix32(number: int) -> int:
    """Permute the 32-bit numbers: the finaliser of MurmurHash3."""
    number ^= number >> 16
    number = number * 0x85EBCA6B % WORD
    number ^= number >> 13
    number = number * 0xC2B2AE35 % WORD
    return number ^ (number >> 16)


def _integer(value: int, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"sampler: {name} must be an int, got {value!r}. Pass int({name}).") from error
