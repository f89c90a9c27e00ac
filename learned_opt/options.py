"""The options of an optimizer's parameter groups, checked where they come in."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError, or TypeError for text, unless ``lr``, ``weight_decay`` and ``total_steps`` can be meant."""
    lr = options.get("lr", 0.0)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name in ("lr", "weight_decay", "total_steps"):
        if isinstance(options.get(name), str):
            raise TypeError(f"{name}={options[name]!r} must be a number")
    for name in ("lr", "weight_decay"):
        value = options.get(name, 0.0)
        if value is None and name == "weight_decay":  # the rule's own
            continue
        if not 0.0 <= float(value) < math.inf:
            raise ValueError(f"{name}={value} must be finite and not negative")
    steps = options.get("total_steps")
    if steps is not None and not 0.0 < float(steps) < math.inf:
        raise ValueError(f"total_steps={steps} must be positive and finite; leave it out if it is not known")


def check_same_horizon(group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raises ValueError if a group has another ``total_steps`` than the first one."""
    if group["total_steps"] != first["total_steps"]:
        raise ValueError(
            f"total_steps={group['total_steps']} in a group, {first['total_steps']} in the first: "
            "the horizon is one for all. Pass it to the constructor."
        )
