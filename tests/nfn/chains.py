"""Networks, their symmetries and the group action on features, for the tests of the chain layers."""

import torch
from torch import nn

from learned_opt.nfn import Chain
from tests.inferred import infer


def zoo_cnn(act=nn.ReLU, width=16, outputs=10):
    """The Small CNN Zoo's architecture."""
    convs = [m for i in (1, width, width) for m in (nn.Conv2d(i, width, 3, 2), act())]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))


def mlp(widths, act=nn.ReLU, bias=True):
    layers = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b, bias=bias), act())]
    return nn.Sequential(*layers[:-1])


def flat_cnn(act=nn.ReLU):
    """A convolution whose positions are flattened, read by a dense layer."""
    return nn.Sequential(nn.Conv2d(2, 3, 3), act(), nn.Flatten(), nn.Linear(3 * 4, 5), act(), nn.Linear(5, 2))


class Sin(nn.Module):
    def forward(self, x):
        return torch.sin(x)


NETWORKS = {
    "mlp": lambda act: mlp([2, 5, 4, 3], act),
    "deep mlp": lambda act: mlp([3, 4, 5, 4, 2], act),
    "one hidden layer": lambda act: mlp([3, 6, 2], act),
    "no bias": lambda act: mlp([3, 4, 5, 2], act, bias=False),
    "cnn": lambda act: zoo_cnn(act, 4, 3),
    "cnn, flattened": flat_cnn,
}
ACTIVATIONS = {"positive": nn.ReLU, "sign": nn.Tanh, "sine": Sin, None: nn.GELU}


def chain_of(model):
    """The chain of a network."""
    return Chain.from_symmetry(infer(model))


def network(kind, scale):
    """Chain and symmetry of a network whose hidden units have a scale of this kind."""
    model = NETWORKS[kind](ACTIVATIONS[scale])
    symmetry = infer(model)
    return Chain.from_symmetry(symmetry), symmetry


def plain(kind, scale):
    """As :func:`network`, every weight without its kernel."""
    chain, _ = network(kind, scale)
    model = mlp(list(chain.widths), ACTIVATIONS[scale])
    return chain_of(model), infer(model)


def random_features(chain, channels=2, batch=2, dtype=torch.float64):
    return {n: torch.randn(batch, channels, *s, dtype=dtype) for n, s in chain.shapes.items()}


def act(symmetry, g, features, dual=False):
    """The group on every network and channel of features."""
    batch, channels = next(iter(features.values())).shape[:2]
    moved = [
        [symmetry.act(g, {n: x[b, c] for n, x in features.items()}, dual=dual) for c in range(channels)]
        for b in range(batch)
    ]
    return {n: torch.stack([torch.stack([x[n] for x in row]) for row in moved]) for n in features}


def error(found, wanted):
    """Largest difference of a parameter relative to its largest entry (features or tensors)."""
    if isinstance(found, torch.Tensor):
        return ((found - wanted).abs().max() / wanted.abs().max()).item()
    assert found.keys() == wanted.keys()
    return max(error(found[n], wanted[n]) for n in wanted)


def broken(layer, symmetry, features, seeds=2):
    """How far a layer is from commuting with random group elements."""
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for _ in range(seeds):
        g = symmetry.sample(generator)
        moved = layer(act(symmetry, g, features))
        wanted = layer(features)
        worst = max(worst, error(moved, wanted if isinstance(wanted, torch.Tensor) else act(symmetry, g, wanted)))
    return worst
