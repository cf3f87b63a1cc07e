"""Every random draw is keyed: (run seed, what it is for, which one). No draw depends on another having been made.

Torch-free; rng.py makes torch generators of the same keys.
"""

from __future__ import annotations

import hashlib
import random


def derive(seed: int, purpose: str, *index: int | str) -> int:
    """A 63-bit seed for one purpose, from a hash of the run's seed, the purpose and the index."""
    text = "\x1f".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def lot(seed: int, content: str) -> bytes:
    """The lot of a content where some of many are chosen: those with the lowest. Adding others changes no lot."""
    return hashlib.sha256(f"{seed}:{content}".encode()).digest()


def rng(seed: int, purpose: str, *index: int | str) -> random.Random:
    """A generator of the standard library for one purpose."""
    return random.Random(derive(seed, purpose, *index))
