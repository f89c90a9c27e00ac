"""Quantities that are refreshed at some steps only: the frame, sizes of weights in it, second moments, their roots."""

import math

import torch
from torch import Tensor

from learned_opt.across import Across
from learned_opt.batches import BatchLayout, FlatBatch, TensorBatch, scales
from learned_opt.frame import potentials
from learned_opt.rules import auto_lr, whitening
from learned_opt.rules.auto_lr import Number
from learned_opt.rules.base import State, Weights
from learned_opt.rules.clock import EVERY_MOMENTS, Clock, when
from learned_opt.rules.directions import (
    BETA2,
    BIAS,
    fan_in_scale,
    product_dtype,
    snr_scale,
    step_norm,
    weight_rms_ratio,
)
from learned_opt.rules.numerics import TINY, root, rsqrt
from learned_opt.rules.slots import Slots, extended, framed, lerp, stored, whitened_axes

VECTOR = 2.0  # times the Adam direction of gains, embeddings and vectors that are no matrix's bias
BUILTIN_DECAY = 0.025  # of a matrix's step goes straight toward zero weights, over 800 steps and at FAN_IN


def refresh_frame(
    layout: BatchLayout, params: Weights, new: State, clock: Clock, total_steps: Number | None, across: Across
) -> None:
    """The scales of units, and what follows from the sizes of weights in the frame: sizes of steps, and decays."""
    if clock.frame is False:
        return
    network, tensor = new["network"], new["tensor"]
    if "log_scale" in network:
        found = potentials(layout.symmetry, params, across=across)
        assert found is not None
        network["log_scale"] = when(clock.frame, found, network["log_scale"])
        for b in layout.all:
            new[b.key] |= scales(b, network["log_scale"])
    sizes, decays = [], []
    scale = BUILTIN_DECAY * auto_lr.decay_scale(clock.now, total_steps)
    for b in layout.all:
        w = framed(b, b.gather(params), new[b.key], False, inverse=True)
        if isinstance(b, FlatBatch):
            sizes.append(w.new_full([len(b.names)], VECTOR))
            decays.append(w.new_zeros(len(b.names)))
        elif b.factored:
            sizes.append(w.new_full([len(w)], VECTOR))
            decays.append(w.new_zeros(len(w)))
        else:
            norm = torch.linalg.vector_norm(w[..., : b.C], dim=(-2, -1))
            ratio = weight_rms_ratio(b, norm / math.sqrt(b.R * b.C))
            sizes.append(ratio)
            relative = step_norm(b) * ratio / norm.clamp(min=TINY) * (norm > 0)
            decays.append(torch.zeros_like(norm) if b.thin else scale * fan_in_scale(b.C) * relative)
    tensor["size"] = when(clock.frame, torch.cat(sizes), tensor["size"])
    tensor["decay"] = when(clock.frame, torch.cat(decays), tensor["decay"])


def update_moments(
    b: TensorBatch | FlatBatch,
    g: Tensor,
    own: Slots,
    square: Tensor,
    age: Number,
    clock: Clock,
    warmup: Number,
    in_place: bool,
) -> None:
    """Second moments: of entries and of embeddings' axes at every step, of matrices' axes and their roots when due."""
    if isinstance(b, FlatBatch) or b.thin:
        own["v"] = lerp(own["v"], g.square(), 1 - BETA2, in_place)
    if isinstance(b, FlatBatch) or (b.thin and isinstance(warmup, float) and warmup == 0):
        return
    if b.factored:
        for i in b.axes:
            own[f"diag{i}"] = lerp(own[f"diag{i}"], whitening.mean_square(b, g, i), 1 - BETA2, in_place)
        return
    whitened = whitened_axes(b)
    if clock.moments is not False:
        every = EVERY_MOMENTS - (EVERY_MOMENTS - 1) * (clock.now <= 3)
        every = every.to(g.dtype) if isinstance(every, Tensor) else every
        dtype = product_dtype(b, g)
        for i in whitened if b.thin else b.axes:
            slot = f"moment{i}" if i in whitened else f"diag{i}"
            if i in whitened:
                found = whitening.packed(whitening.second_moment(b, g, i, dtype))
            else:
                found = whitening.mean_square(b, g, i)
            found = lerp(own[slot], found, 1 - whitening.AVERAGE**every, in_place)
            own[slot] = when(clock.moments, found, own[slot])
        if b.biases:
            v = lerp(own["v_bias"], g[..., -1].square(), 1 - BETA2**every, in_place)
            own["v_bias"] = when(clock.moments, v, own["v_bias"])
            own["snr"] = when(clock.moments, snr_scale(own, square, age), own["snr"])
        own |= derived(b, own) if b.is_matrix else {}
    if clock.roots is not False:
        for i in whitened:
            d = b.shape[i]
            due = clock.roots if isinstance(clock.roots, bool) else clock.roots | (own[f"root{i}"][..., 0, 0] == 0)
            power = whitening.WARMUP_POWER if b.thin else whitening.POWER
            moment = whitening.unpacked(own[f"moment{i}"])
            found = whitening.inverse_root(moment, own[f"root{i}"][..., :d, :d], due, power)
            own[f"root{i}"] = stored(extended(b, i, found), own[f"root{i}"], in_place)


def derived(b: TensorBatch, own: Slots) -> Slots:
    """What steps of matrices read of the second moments.

    ``scale{i}``: along an axis that is not whitened, ``v^(-1/4)`` for v of rank one, relative to its mean;
    ``bias_scale``: what biases are multiplied by; ``seen_scale``: 1 for rows that have had a gradient, and may decay.
    """
    found = {}
    whitened = whitened_axes(b)
    seen = own["m"].new_ones(len(b.names), *[1] * len(b.shape))
    for i in b.axes:
        v = own[f"moment{i}"][..., 0] if i in whitened else own[f"diag{i}"]
        if i not in whitened:
            found[f"scale{i}"] = root(rsqrt(v / v.mean(-1, keepdim=True).clamp(min=TINY) + 1e-8))
        if b.is_row(i):
            seen = seen * (v > 0).view(len(v), *[-1 if k == i else 1 for k in range(len(b.shape))])
    if b.biases:
        found["bias_scale"] = BIAS * own["snr"][:, None]
    return found | {"seen_scale": seen}
