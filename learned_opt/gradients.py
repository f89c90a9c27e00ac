"""Which gradients a step of :class:`NFNOpt` takes, and as what: what is not finite, too large, or of no use."""

import math
import warnings
from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor

from learned_opt.functional import computing_dtype
from learned_opt.params import NamedParam
from learned_opt.text import listed

NanPolicy = Literal["skip", "raise", "propagate"]
LARGEST = 1e15  # largest gradient entry that a rule sees; float32 squares overflow at 2e19


def nothing_to_do(trained: list[NamedParam], groups: list[dict[str, Any]]) -> bool:
    """Whether a call of ``step`` is none: no gradients, or all of them zero while the ``lr`` of all groups is.

    torch's distributed checkpointing asks for state in the latter way.
    """
    entries = [e for e in trained if e.param.numel()]
    at_rest = all(float(group["lr"]) == 0 for group in groups)
    return not entries or (at_rest and not any(_bounds(entries)))


def usable(trained: list[NamedParam], policy: NanPolicy, skipped: Counter[str]) -> list[NamedParam]:
    """The tensors to update, by what their gradients hold (one synchronisation per device).

    Args:
        trained: tensors with a gradient.
        policy: what a gradient with NaN or infinity does.
        skipped: counts, for each tensor, the steps at which it was not updated; this one is added.

    Raises:
        FloatingPointError: a non-finite gradient under "raise".
    """
    entries = [e for e in trained if e.param.numel()]
    if policy == "propagate":
        return entries
    largest = _bounds(entries)
    bad = [e for e, x in zip(entries, largest, strict=True) if not math.isfinite(x)]
    if bad and policy == "raise":
        raise FloatingPointError(
            f"non-finite gradient of {listed([e.name for e in bad])}. Nothing was changed. "
            "Lower the learning rate, clip the loss, or pass nan_policy='skip'."
        )
    for entry in bad:
        if not skipped[entry.name]:
            warnings.warn(
                f"NFNOpt: non-finite gradient of {entry.name}: the tensor is not updated at this step. "
                "optimizer.skipped_steps counts; nan_policy='raise' stops instead.",
                stacklevel=4,
            )
        skipped[entry.name] += 1
    good = [(e, x) for e, x in zip(entries, largest, strict=True) if math.isfinite(x)]
    return [e._replace(shrink=LARGEST / x) if x > LARGEST else e for e, x in good]


def to_descend(entry: NamedParam) -> Tensor:
    """The gradient as the rule takes it: shrunk if it is too large, and negated where the group is to ascend."""
    factor = -entry.shrink if entry.group["maximize"] else entry.shrink
    return entry.grad if factor == 1 else factor * entry.grad.to(computing_dtype([entry.grad]))


def _bounds(entries: list[NamedParam]) -> list[float]:
    """Of the magnitudes of gradients; those in shards were looked at on all ranks."""
    known = [e.largest for e in entries if e.largest is not None]
    return known if len(known) == len(entries) else largest_magnitudes([e.grad for e in entries])


def largest_magnitudes(tensors: list[Tensor]) -> list[float]:
    """A bound of the largest magnitude of each, NaN if it has one: the 2-norm, which is fast, unless it overflows."""
    largest = [0.0] * len(tensors)
    for device in {t.device for t in tensors}:
        here = [i for i, t in enumerate(tensors) if t.device == device]
        norms = torch._foreach_norm([tensors[i] for i in here])
        if not all(x < LARGEST for x in torch.stack([n.float() for n in norms]).tolist()):
            norms = torch._foreach_norm([tensors[i] for i in here], math.inf)
        wide = any(n.dtype == torch.float64 for n in norms)
        stacked = torch.stack([n.to(torch.float64 if wide else torch.float32) for n in norms])
        for i, x in zip(here, stacked.tolist(), strict=True):
            largest[i] = x
    return largest
