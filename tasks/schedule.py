"""Factors of a learning rate over a run."""

import math


def half_cosine(done: float, of: float = 1.0) -> float:
    """From 1 where nothing is done to 0 where all is."""
    return 0.5 * (1 + math.cos(math.pi * done / of))


def warm_up_and_cosine(progress: float, warm_up: float = 0.1) -> float:
    """A linear rise over the first tenth of the run (``progress`` from 0 to 1), then half a cosine to zero."""
    if progress < warm_up:
        return (progress + 0.1 * warm_up) / (1.1 * warm_up)
    return half_cosine(progress - warm_up, 1 - warm_up)
