"""Six networks on digits, most of which come to fit every example: where the last steps' noise is what is left to lose.

    PYTHONPATH=experiments/49-rate-halved-by-gradient-correlation python experiments/28-longer-momentum/constants.py \
      --suite near_zero:SUITE auto_lr.NOISE_LR=1

keeps the measured rate where gradients are independent.
"""

from functools import partial

from tasks import conv, mlp
from tasks.data import Noisy, digits
from tasks.task import Task


def dense(noise: float, hidden: list[int], activation: str, batch_size: int, steps: int, scale: float = 1.0) -> Task:
    """An MLP."""
    name = f"{activation}-{len(hidden)}"
    data = Noisy(digits(), noise)
    return mlp.classifier(name, data, hidden, activation, batch_size=batch_size, steps=steps, scale=scale)


def convolutions(channels: list[int]) -> Task:
    """A CNN."""
    return conv.classifier("cnn", Noisy(digits(), 0.2), channels, "relu", batch_size=32, steps=800)


SUITE = {
    "gelu": partial(dense, 0.2, [120, 80], "gelu", 64, 800),
    "relu": partial(dense, 0.1, [100, 60], "relu", 64, 600),
    "tanh": partial(dense, 0.2, [90, 50], "tanh", 128, 600),
    "deep-tanh": partial(dense, 0.5, 7 * [48], "tanh", 64, 700, 1.6),
    "cnn-2": partial(convolutions, [9, 18]),
    "cnn-3": partial(convolutions, [9, 18, 36]),
}
