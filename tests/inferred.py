"""The symmetries of the networks of the tests, inferred once per structure on an input that fits."""

import copy
import functools

import torch
from torch import nn

from learned_opt import infer_symmetry

SIDES = (28, 20, 16, 12, 8, 6, 5, 4, 3, 2)  # of images; a dense layer behind a convolution admits one of them


def infer(model):
    """The inferred symmetry; what is checked numerically in other tests is not checked here."""
    return _infer(_Same(model))


class _Same:
    """A model that equals those of the same modules with the same settings and shapes."""

    def __init__(self, model):
        self.model = model
        plain = (int, float, bool, str, tuple)
        settings = [[(k, v) for k, v in vars(m).items() if isinstance(v, plain)] for m in model.modules()]
        shapes = [(n, tuple(p.shape), p.dtype) for n, p in model.named_parameters()]
        self.key = repr((model, settings, shapes))

    def __eq__(self, other):
        return self.key == other.key

    def __hash__(self):
        return hash(self.key)


@functools.lru_cache(maxsize=256)
def _infer(same):
    return infer_symmetry(same.model, example(same.model), verify=False)


def example(model):
    """Two inputs of a chain or of a transformer of ``tasks``."""
    first = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding))
    dtype = first.weight.dtype
    tokens = model.pos.shape[:1] if hasattr(model, "pos") else ()
    if isinstance(first, nn.Embedding):
        return torch.arange(2 * tokens[0]).reshape(2, -1) % first.num_embeddings
    if isinstance(first, nn.Linear):
        return torch.randn(2, *tokens, first.in_features, dtype=dtype)
    trial = copy.deepcopy(model)  # running statistics move
    for side in SIDES:
        x = torch.randn(2, first.in_channels, side, side, dtype=dtype)
        try:
            trial(x)
        except RuntimeError:
            continue
        return x
    raise ValueError(f"no image fits {model}")
