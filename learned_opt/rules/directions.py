"""Directions of tensors that take no polar steps, and the sizes of steps. Arguments that the functions share:

* ``own``: slots of the batch.
* ``size`` [N]: minus the rate, times the tensor's factor; directions are multiplied by it.
* ``square`` [N]: running mean square of the gradients of each tensor, in the frame.
* ``age``: steps that the tensors have taken; one number, or [N].
* ``warmup``: 1 in the warm-up, then falling linearly to 0.
"""

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from learned_opt.batches import BFLOAT16_ABOVE, FlatBatch, TensorBatch
from learned_opt.rules import auto_lr, whitening
from learned_opt.rules.auto_lr import Number
from learned_opt.rules.numerics import ROUNDING, TINY, root, rsqrt
from learned_opt.rules.slots import Slots, norm_of, whitened_axes

BETA2 = 0.99  # decay rate of mean squares
SIZE = 0.9  # of the result of Newton and Schulz over the square root of the rank
BIAS, SNR = 3.0, 0.2  # size of the input that a bias stands for; RMS of Adam's direction below which biases step less
USUAL, SMALLEST = 0.5, 0.1  # RMS times root fan-in of usual weights; relative to that, what smaller ones count as
FAN_IN = 512  # at which a matrix takes steps of RMS 0.2


def flat_direction(
    b: FlatBatch, own: Slots, size: Tensor, square: Tensor, largest_square: Tensor, age: Number
) -> Tensor:
    """Adam's direction of every entry, ``[Z]``; zero for vectors whose gradients are rounding noise beside others'.

    ``largest_square`` (0-d): the largest ``square`` of the network.
    """
    above_noise = square > (ROUNDING * torch.finfo(square.dtype).eps) ** 2 * largest_square
    factor = size * bias_correction(age) * above_noise
    factor, epsilon = torch.stack([factor, 1e-16 * square]).index_select(1, b.segment)
    return own["m"].to(factor.dtype) * rsqrt(own["v"] + epsilon) * factor


def thin_direction(
    b: TensorBatch,
    g: Tensor,
    own: Slots,
    beta1: Tensor,
    size: Tensor,
    square: Tensor,
    age: Number,
    warmup: Number,
) -> Tensor:
    """Adam's direction of thin matrices, ``[N, R, C]``; in the warm-up turned to ``A^(-3/4) n``, at its size.

    They read the network's inputs or write its outputs, and the first gradients of all hidden units agree on where to
    go: a long way along that saturates a policy for good, before it has learned anything else (experiments, 48).
    """
    adam = own["m"].to(g.dtype) * rsqrt(own["v"] + 1e-16 * square[:, None, None])
    roots = {i: own[f"root{i}"].to(g.dtype) for i in whitened_axes(b)}
    if roots and not (isinstance(warmup, float) and warmup == 0):
        whitened = whitening.multiplied(b, torch.lerp(g, own["m"].to(g.dtype), beta1), roots)
        norm = norm_of(adam)
        turned = torch.lerp(adam, whitened * (norm / norm_of(whitened)), warmup)
        adam = turned * (norm / norm_of(turned))
    return adam * (size * bias_correction(age))[:, None, None]


def factored_direction(b: TensorBatch, own: Slots, size: Tensor, square: Tensor, age: Number) -> Tensor:
    """Adam's direction with v of rank one: ``[N, R, K]``."""
    d = own["m"].to(square.dtype)
    for i in b.axes:
        d = along(b, d, i, rsqrt(own[f"diag{i}"] / square.clamp(min=TINY)[:, None] + 1e-16))
    return d * (size * bias_correction(age) * rsqrt(square))[:, None, None]


def bias_correction(age: Number) -> Number:
    """Adam's factor ``sqrt(1 - beta2^age) / (1 - beta1^age)`` of ``m / sqrt(v)``."""
    return (1 - BETA2**age) ** 0.5 / (1 - auto_lr.BETA1**age)


def snr_scale(own: Slots, square: Tensor, age: Number) -> Tensor:
    """Factor of the biases' steps ``[N]``: ``min(1, RMS of Adam's direction / SNR)``, below 1 where gradients alternate
    or are rounding noise."""
    v = (own["v_bias"] + 1e-16 * square[:, None]).clamp(min=TINY)
    return (root((own["m"][..., -1].square() / v).mean(-1)) * (bias_correction(age) / SNR)).clamp(max=1.0)


# ------------------------------------------------------------------------------------- matrices
def preconditioned(b: TensorBatch, n: Tensor, own: Slots, roots: Mapping[int, Tensor], in_place: bool) -> Tensor:
    """``n / v^(1/4)`` along axes that are not whitened; a bias is the weight of an input of size ``BIAS``."""
    for i in b.axes:
        if i not in roots:
            n = along(b, n, i, own[f"scale{i}"], in_place)
    if b.biases:
        n[..., -1].mul_(BIAS)
    return n


def along(b: TensorBatch, x: Tensor, axis: int, vector: Tensor, in_place: bool = False) -> Tensor:
    """``[N, R, K]`` times ``[N, d]`` along an axis of the tensors; biases have the rows of their matrices."""
    if not b.is_plain:
        shape = [len(x)] + [1] * len(b.shape)
        shape[axis + 1] = -1
        tensors = b.tensors(x)
        product = torch.mul(tensors, vector.view(shape), out=tensors if in_place else None)
        return x if in_place else b.matrices(product)
    if b.is_row(axis):
        factor = vector[:, :, None]
    else:
        factor = vector.repeat(1, b.kernel)[:, None, :]
        factor = functional.pad(factor, (0, 1), value=1.0) if b.biases else factor
    return torch.mul(x, factor, out=x if in_place else None)


def step_scale(rows: int, columns: int, has_bias: bool) -> float:
    """What a polar factor is multiplied by at unit rate."""
    fan_in = columns - has_bias
    return 0.2 * fan_in_scale(fan_in) * max(rows, fan_in) ** 0.5


def step_norm(b: TensorBatch) -> float:
    """The norm of a usual step of a tensor at unit rate: that of polar factors of full rank."""
    if b.pack is None:
        matrices = [(1, r, b.K, bool(b.biases)) for r in b.parts]
    else:
        matrices = [(*block.shape, False) for block in b.pack.blocks]
    return math.sqrt(sum(n * (step_scale(r, k, bias) * SIZE) ** 2 * min(r, k) for n, r, k, bias in matrices))


def fan_in_scale(fan_in: int) -> float:
    """``(512 / C)^(1/4)``."""
    return (FAN_IN / fan_in) ** 0.25


def weight_rms_ratio(b: TensorBatch, rms: Tensor) -> Tensor:
    """The weights' RMS relative to usual ones, 1 for those that are not small: ``[N]``."""
    return (rms * (b.C**0.5 / USUAL)).clamp(SMALLEST, 1.0)


def product_dtype(b: TensorBatch, x: Tensor) -> torch.dtype:
    """In which a batch's products of matrices are taken: bfloat16 where that is faster, never for float64."""
    fast = x.dtype == torch.float32 and min(b.R, b.K) > BFLOAT16_ABOVE and has_bfloat16(x.device)
    return torch.bfloat16 if fast else x.dtype


@lru_cache(maxsize=16)
def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 faster than of float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return device.type == "mps"
