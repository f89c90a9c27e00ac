"""Random generators without a state of their own: a purpose names its draws."""

import hashlib
from typing import Any

from torch import Generator


def generator_of(*key: Any) -> Generator:
    """A generator that depends on what the key prints as, and on nothing else."""
    seed = hashlib.sha256(repr(key).encode()).digest()[:8]
    return Generator().manual_seed(int.from_bytes(seed) >> 1)
