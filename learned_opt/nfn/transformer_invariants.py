"""Fixed invariants of a transformer's weights: statistics and spectra that no element of its group changes.

GL within a head leaves ``W_Q W_K^T`` and ``W_V W_O`` as they are; permutations of heads, units and stream rearrange the
entries of these products and of the other tensors, and multiply matrices by permutations from both sides. So the
distribution of entries of each, and its singular values, are invariant. So are the singular values of products of
neighbours along the network, in which the permutation between them cancels: how far a layer reads what the one before
it writes. The invariant layer of Transformer-NFN is polynomial of degree two in one block's weights: quartiles, spectra
and what goes across blocks are none of its functions.
"""

from functools import reduce

import torch
from torch import Tensor

from learned_opt.nfn.baselines import statistics
from learned_opt.nfn.transformer_space import TransformerFeatures, TransformerSpec

FLOOR = 1e-6  # singular values below it are noise
LEADING = 4  # singular values of a product along the network


def transformer_invariants(spec: TransformerSpec, features: TransformerFeatures) -> Tensor:
    """Mean, variance and quartiles of the entries, and logarithms of the singular values, of every tensor.

    Of a block's attention those of the products, entries of all heads together, log-spectra averaged over heads. Of
    products along the network the leading singular values, the norm, and its ratio to the norms of the factors.

    Args:
        spec: of the transformers.
        features: ``[B, C, ...]``.

    Returns:
        ``[B, C * n]``, channels slowest.
    """
    tensors: dict[str, Tensor] = {}
    spectra: list[Tensor] = []
    for i in range(len(spec.names)):
        x = {n: t[:, :, i] for n, t in features.blocks.items()}
        pairs = {"qk": (x["q"], x["k"].transpose(-1, -2), spec.d_k), "vo": (x["v"], x["o"], spec.d_v)}
        for name, (left, right, rank) in pairs.items():
            product = left @ right
            tensors[f"{i}.{name}"] = product
            spectra.append(_log_spectrum(product, rank).mean(2))
        tensors |= {f"{i}.{name}": x[name] for name in spec.feed_forward}
        spectra += [_log_spectrum(x[name]) for name, dims in spec.feed_forward.items() if len(dims) > 1]
    tensors |= features.rest
    spectra += [_log_spectrum(x.flatten(3)) for x in features.rest.values() if x.ndim > 3]
    for factors in along_the_network(spec, features):
        product = reduce(torch.matmul, factors)
        norm = _log_norm(product)
        spectra += [_log_spectrum(product, LEADING), norm, norm - sum(_log_norm(x) for x in factors)]
    return torch.cat([statistics(tensors), *spectra], -1).flatten(1)


def along_the_network(spec: TransformerSpec, features: TransformerFeatures) -> list[tuple[Tensor, ...]]:
    """Matrices ``[B, C, ...]`` that follow each other, heads summed: in blocks, across blocks, to the classifier."""
    blocks = [{n: t[:, :, i] for n, t in features.blocks.items()} for i in range(len(spec.names))]
    d = spec.dim
    vo = [(x["v"][..., :d, :] @ x["o"]).sum(2) for x in blocks]
    qk = [(x["q"][..., :d, :] @ x["k"][..., :d, :].transpose(-1, -2)).sum(2) for x in blocks]
    found: list[tuple[Tensor, ...]] = []
    for i, x in enumerate(blocks):
        found += [(vo[i], x["a"]), (x["a"], x["b"])]
        if i + 1 < len(blocks):
            found += [(x["b"], vo[i + 1]), (x["b"], qk[i + 1], x["b"].transpose(-1, -2))]
    path = [blocks[-1]["b"]]
    for name, dims in spec.classifier.items():
        if len(dims) == 2 and dims[1].size == path[-1].shape[-1]:
            path.append(features.rest[name].transpose(-1, -2))
            found += [tuple(path), *([tuple(path[1:])] if len(path) > 2 else [])]
    return found


def _log_norm(x: Tensor) -> Tensor:
    return x.flatten(2).norm(dim=2, keepdim=True).clamp_min(FLOOR).log()


def _log_spectrum(x: Tensor, rank: int | None = None) -> Tensor:
    """Logarithms of the singular values of the last two dims, falling; the first ``rank`` of them."""
    return torch.linalg.svdvals(x)[..., :rank].clamp_min(FLOOR).log()
