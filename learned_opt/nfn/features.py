"""Weight-space features: ``{name: [batch, channels, *parameter shape]}`` from state_dicts, and back."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from learned_opt.nfn.chain import Features


def features_of(states: Sequence[Mapping[str, Tensor]]) -> Features:
    """The weights of several networks of one architecture as features with one channel.

    Args:
        states: state_dicts (or gradients, or moments, by parameter name).

    Returns:
        ``{name: [len(states), 1, *shape]}``.

    Raises:
        ValueError: no networks, or one whose names or shapes differ from the first's.
    """
    if not states:
        raise ValueError("features_of needs at least one state_dict")
    shapes = {n: tuple(x.shape) for n, x in states[0].items()}
    for i, state in enumerate(states):
        other = {n: tuple(x.shape) for n, x in state.items()}
        if other != shapes:
            wrong = sorted(n for n in shapes.keys() | other.keys() if shapes.get(n) != other.get(n))
            name = wrong[0]
            raise ValueError(
                f"network {i} has another architecture than network 0: {name} is {other.get(name, 'missing')}, "
                f"not {shapes.get(name, 'missing')}. Make one batch per architecture."
            )
    return {n: torch.stack([state[n] for state in states]).unsqueeze(1) for n in shapes}


def stack(*features: Features) -> Features:
    """Several features of the same networks as channels of one (weights, then gradients, then moments)."""
    return {n: torch.cat([f[n] for f in features], 1) for n in features[0]}


def unstack(features: Features, channel: int = 0) -> list[dict[str, Tensor]]:
    """One channel as state_dicts, one per network: the inverse of :func:`features_of`."""
    return [
        dict(zip(features, xs, strict=True)) for xs in zip(*(x[:, channel] for x in features.values()), strict=True)
    ]


def split_channels(features: Features, channels: int) -> tuple[Features, Features]:
    """The first ``channels`` channels and the others."""
    return {n: x[:, :channels] for n, x in features.items()}, {n: x[:, channels:] for n, x in features.items()}


def map_features(function: Callable[[Tensor], Tensor], features: Features) -> Features:
    """Apply a function to every tensor."""
    return {n: function(x) for n, x in features.items()}
