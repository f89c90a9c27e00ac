"""Four tasks whose initial weights are smaller than torch's: what steps in proportion to small weights cost there.

    python experiments/28-longer-momentum/constants.py --suite starts:SUITE whitened_polar.SMALLEST=1

takes usual steps whatever the weights.
"""

from collections.abc import Mapping

from torch import Tensor

from tasks import conv, mlp, residual, transformer
from tasks.data import Noisy, digits, photos, text
from tasks.task import Supervised


def started(task: Supervised, sizes: Mapping[str, float]) -> Supervised:
    """The task, the initial matrices whose names end so of that RMS."""
    usual = task.init

    def sized(name: str, w: Tensor) -> Tensor:
        size = next((size for end, size in sizes.items() if name.endswith(end)), None)
        return w if size is None or w.ndim < 2 else w * (size / w.square().mean().sqrt())

    task.init = lambda generator: {n: sized(n, w) for n, w in usual(generator).items()}  # of this task alone
    return task


def _zero_branches() -> Supervised:
    """Blocks that begin as the identity (Fixup, ReZero, most diffusion models)."""
    task = residual.mlp_classifier(
        "zero-branches", Noisy(photos(8, (1, 5)), 0.2), width=48, hidden=96, depth=4, activation="gelu",
        batch_size=64, steps=500,
    )  # fmt: skip
    return started(task, {"down.weight": 0.0})


def _zero_head() -> Supervised:
    """A last layer that begins at zero (muP)."""
    return started(
        conv.classifier("zero-head", Noisy(digits(), 0.5), [12, 24], "relu", batch_size=64, steps=500),
        {"6.weight": 0.0},
    )


def _gpt() -> Supervised:
    """All matrices normal of 0.02, those that write the stream smaller with depth (GPT-2)."""
    task = transformer.language_model("gpt", text(24), width=32, heads=4, depth=3, hidden=96, batch_size=16, steps=600)
    return started(task, {"proj.weight": 0.02 / 6**0.5, "fc2.weight": 0.02 / 6**0.5, "weight": 0.02})


def _tenth() -> Supervised:
    """An MLP at a tenth of the usual weights."""
    return mlp.classifier("tenth", Noisy(digits(), 0.5), [80, 64], "relu", batch_size=64, steps=500, scale=0.1)


SUITE = {"zero-branches": _zero_branches, "zero-head": _zero_head, "gpt": _gpt, "tenth": _tenth}
