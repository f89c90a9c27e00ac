"""The rule of :mod:`learned_opt.rules.whitened_polar` one tensor after the other: to read, and to test that one by.

No batches, no buffers, no cached indices: plain torch in the order of the equations. It is slow, and does not run
under ``vmap``. Its state is by tensor: ``state[name][slot]``, and ``state["network"]``.
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from learned_opt.frame import potentials
from learned_opt.rules import auto_lr
from learned_opt.rules.auto_lr import Measured, Number
from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.rules.newton_schulz import newton_schulz
from learned_opt.symmetry import Element, Symmetry
from learned_opt.symmetry.axes import leaves_of

BETA2, MOMENT_BETA = 0.99, 0.98
NUMBERS = ("step", "mean_square", "size", "decay", "update_norm")
TINY = 1e-30
THIN, BOUND = 4, 544


class Reference(UpdateRule):
    """Whitened polar steps on matrices, Adam's on the rest, by loops over tensors.

    Args:
        measure_lr: whether the rate is measured, or the schedule's.
    """

    ends = sets_rate = True

    def __init__(self, measure_lr: bool = True) -> None:
        super().__init__()
        self.measure_lr = measure_lr

    def init(self, params: Weights, symmetry: Symmetry) -> State:
        some = next(iter(params.values()))
        state: State = {"network": {k: some.new_zeros(()) for k in ("clock", *Measured._fields, "log_scale")}}
        state["network"]["beta1"] = some.new_zeros(()) + auto_lr.BETA1
        matrix_of = joined(symmetry, tuple(params))
        for n, p in params.items():
            own = state[n] = {k: torch.zeros_like(p) for k in ("m", "last_update")}
            own |= {k: p.new_zeros(()) for k in NUMBERS if n not in matrix_of}
            if kind(symmetry, n) == "thin":
                own["v"] = torch.zeros_like(p)
            if n in matrix_of:
                own["snr"] = p.new_ones(())
            for i in axes(symmetry, n) if kind(symmetry, n) != "thin" else whitened(symmetry, n):
                d = p.shape[i]
                if i in whitened(symmetry, n):
                    own |= {f"moment{i}": p.new_zeros(d, d), f"root{i}": p.new_zeros(d, d)}
                else:
                    own[f"diag{i}"] = p.new_zeros(d)
        return state

    def forward(
        self,
        params: Weights,
        grads: Weights,
        state: State,
        symmetry: Symmetry,
        *,
        total_steps: Number | None = None,
        weight_decay: float | None | Mapping[str, float | None] = None,
        names: tuple[str, ...] | None = None,
        ages: Collection[int] | None = None,
        in_place: bool = False,
    ) -> tuple[Weights, State]:
        names = tuple(params) if names is None else names
        network = dict(state["network"])
        new = {"network": network} | {n: dict(state[n]) for n in names}
        matrix_of = joined(symmetry, names)
        bias_of = {weight: bias for bias, weight in matrix_of.items()}
        owners = [n for n in names if n not in matrix_of]
        t = network["clock"] = network["clock"] + 1
        for n in owners:
            new[n]["step"] = new[n]["step"] + 1
        now = {int(t), *(int(new[n]["step"]) for n in owners if n in grads)}
        frame_due, moments_due = (any(a <= 3 or a % every == 0 for a in now) for every in (10, 5))

        # the frame
        if frame_due:
            log_scale = potentials(symmetry, params)
            network["log_scale"] = t * 0 if log_scale is None else log_scale
        scale = scales(symmetry, network["log_scale"], {n: params[n] for n in names})
        if frame_due:
            for n in owners:
                new[n] |= size_and_decay(symmetry, n, params[n] / scale[n], t, total_steps)

        # gradients in the frame, clipped at four times what was usual before
        g = {n: scale[n] * grads.get(n, torch.zeros_like(params[n])) for n in names}
        norm, numel = {}, {}
        for n in owners:
            whole = [n, bias_of[n]] if n in bias_of else [n]
            numel[n] = sum(g[k].numel() for k in whole)
            norm[n] = math.sqrt(sum(float(g[k].square().sum()) for k in whole))
            usual = new[n]["mean_square"] / (1 - BETA2 ** (new[n]["step"] - 1).clamp(min=1))
            most = 4 * math.sqrt(float(usual) * numel[n])
            factor = min(1.0, most / norm[n]) if usual > 0 and norm[n] > 0 else 1.0
            norm[n] *= factor
            g |= {k: factor * g[k] for k in whole}
            new[n]["mean_square"] = BETA2 * new[n]["mean_square"] + (1 - BETA2) * norm[n] ** 2 / numel[n]

        # the slope along the last step, the momentum that it asks for, and what the rate gains by it
        if self.measure_lr and (int(t) <= 51 or int(t) % 5 == 0):
            down = sum((g[n] * state[n]["last_update"]).sum() for n in names)
            length = torch.stack([norm[n] * state[n]["update_norm"] for n in owners]).sum()
            old = Measured(*(network[k] for k in Measured._fields))
            network["slope"] = 0.8 * old.slope + 0.2 * (down / length if length > 0 else 0 * t)
            network["log_lr"] = auto_lr.log_lr(old, network["slope"], t, total_steps)
            network["beta1"] = auto_lr.beta1(t, network["slope"])
        beta1 = network["beta1"]

        # momentum, second moments
        warmup = float(auto_lr.warmup_weight(t, total_steps))
        kept = MOMENT_BETA ** (1 if t <= 3 else 5), BETA2 ** (1 if t <= 3 else 5)
        for n in names:
            own = new[n]
            own["m"] = beta1 * own["m"] + (1 - beta1) * g[n]
            if kind(symmetry, n) == "table":
                update_moments(own, g[n], axes(symmetry, n), BETA2)
            elif kind(symmetry, n) == "matrix" and moments_due:
                update_moments(own, g[n], axes(symmetry, n), kept[0])
            elif n in matrix_of and moments_due:
                own["v"] = kept[1] * own["v"] + (1 - kept[1]) * g[n].square()
                matrix = new[matrix_of[n]]
                adam = own["m"] / (own["v"] + 1e-16 * matrix["mean_square"]).clamp(min=TINY).sqrt()
                rms = adam.square().mean().sqrt() * correction(matrix["step"])
                own["snr"] = (rms / 0.2).clamp(max=1.0)
            elif n not in matrix_of and "v" in own:
                own["v"] = BETA2 * own["v"] + (1 - BETA2) * g[n].square()
                if moments_due and warmup > 0:
                    update_moments(own, g[n], whitened(symmetry, n), kept[0])
            thin = kind(symmetry, n) == "thin"
            if any(map(roots_are_due, now)) and (warmup > 0 or not thin):
                power = -0.75 if thin else -0.125
                own |= {f"root{i}": root(own[f"moment{i}"], power) for i in whitened(symmetry, n)}

        # the rate
        old, end = Measured(*(network[k] for k in Measured._fields)), auto_lr.warmup_steps(total_steps)
        if self.measure_lr and 2 * end < t <= 3 * end:
            m2 = sum(new[n]["m"].square().sum() for n in names)
            v = sum(numel[n] * new[n]["mean_square"] / (1 - BETA2 ** new[n]["step"]) for n in owners)
            correlation = (1 + beta1) / (1 - beta1) * m2 / v if v > 0 else 0 * t
            network["correlation"] = auto_lr.mean_correlation(old, correlation, t, total_steps)
            old = old._replace(correlation=network["correlation"])
        scale_of_lr: Number = auto_lr.lr_scale(old, t, total_steps)
        if not self.measure_lr:
            scale_of_lr = 1.0 if total_steps is None else auto_lr.horizon_scale(total_steps)
        rate = scale_of_lr * auto_lr.RATE * auto_lr.decay(t, total_steps)

        # steps, and the rule's own decay of the matrices
        updates: Weights = {}
        loudest = max(new[n]["mean_square"] for n in owners)
        for n in owners:
            own, bias = new[n], bias_of.get(n)
            if kind(symmetry, n) == "matrix":
                steps = matrix_step(symmetry, n, bias, g, new, beta1)
            else:
                momentum = beta1 * own["m"] + (1 - beta1) * g[n]
                steps = {n: vector_step(symmetry, n, own, momentum, loudest, warmup)}
            if t + 1 <= 51 or (t + 1) % 5 == 0:
                for k, d in steps.items():
                    new[k]["last_update"] = rate * own["size"] * d
                own["update_norm"] = torch.stack([new[k]["last_update"].norm() for k in steps]).norm()
            for k, d in steps.items():
                updates[k] = -scale[k] * rate * own["size"] * d
                asked = weight_decay.get(k) if isinstance(weight_decay, Mapping) else weight_decay
                if asked is not None:
                    updates[k] = updates[k] - rate * asked * params[k]
                elif k == n and kind(symmetry, n) == "matrix":
                    updates[k] = updates[k] - rate * own["decay"] * seen_rows(symmetry, n, own) * params[k]
        for n in names:  # what has no gradient sits this step out
            new[n] = new[n] if n in grads else state[n]
        return {n: updates[n] for n in grads}, new


# ------------------------------------------------------------------------------------------ what tensors are
def kind(symmetry: Symmetry, name: str) -> str:
    """What a tensor steps as: "thin" (vectors too), "matrix", or "table" (an embedding)."""
    shape = symmetry.specs[name].shape
    if len(shape) < 2 or min(shape[0], math.prod(shape[1:])) <= THIN:
        return "thin"
    return "matrix" if all(b.kind == "matrix" for b in symmetry.blocks[name]) else "table"


def is_read(role: str) -> bool:
    """Whether an axis of this role belongs to the columns."""
    return role not in ("out", "gain")


def joined(symmetry: Symmetry, names: tuple[str, ...]) -> dict[str, str]:
    """The matrix that each bias is a column of: by name, if both are cut alike into one row of numbers a unit."""
    found = {}
    for weight in names:
        path, dot, last = weight.rpartition(".")
        bias = path + dot + last.replace("weight", "bias")
        if kind(symmetry, weight) != "matrix" or bias == weight or bias not in names:
            continue
        spec, one, other = symmetry.specs[weight], symmetry.blocks[weight], symmetry.blocks[bias]
        rows = [i for i, r in enumerate(spec.roles) if not is_read(r)]
        reads = [d for d, r in zip(spec.shape, spec.roles, strict=True) if is_read(r) and r != "kernel" and d > 1]
        if len(rows) != 1 or len(reads) > 1 or len(symmetry.specs[bias].shape) != 1:
            continue
        number = along(torch.ones(spec.shape), rows[0], torch.arange(spec.shape[rows[0]]))
        in_order = torch.cat([x.flatten(0, 1)[:, 0] for x in symmetry.split(weight, number)]).diff().eq(1).all()
        alike = [(b.batch, b.rows) for b in one] == [(b.batch, b.rows) for b in other]
        if alike and in_order and all(b.kind == "vector" for b in other):
            found[bias] = weight
    return found


def axes(symmetry: Symmetry, name: str) -> list[int]:
    """Axes with second moments: those of more than four units, kernel positions left out."""
    spec, (fibres, _) = symmetry.specs[name], symmetry.entangled(name)
    return [i for i, d in enumerate(spec.shape) if d > THIN and spec.roles[i] != "kernel" and i not in fibres]


def whitened(symmetry: Symmetry, name: str) -> list[int]:
    """Those of hidden units, if they are not too many."""
    spec = symmetry.specs[name]
    hidden = [any(leaf.label is not None for leaf in leaves_of(a)) for a in spec.axes]
    _, bases = symmetry.entangled(name)
    matrix = len(hidden) > 1 and all(b.kind == "matrix" for b in symmetry.blocks[name])
    return [i for i in axes(symmetry, name) if matrix and hidden[i] and i not in bases and spec.shape[i] <= BOUND]


def scales(symmetry: Symmetry, log_scale: Tensor, like: Weights) -> Weights:
    """Of every entry: what the group's element of these scales makes of ones."""
    tables, start = {}, 0
    for n, one in symmetry.identity(log_scale.dtype).scales.items():
        tables[n] = log_scale[start : start + one.numel()].exp().view(one.shape) if log_scale.ndim else one
        start += one.numel()
    ones = {n: torch.ones_like(x) for n, x in like.items()}
    return symmetry.act(Element(symmetry.identity().perms, tables), ones)


# ------------------------------------------------------------------------------------------ second moments
def roots_are_due(t: int) -> bool:
    """At steps 1 to 3, every ten up to 50, then whenever the run is 1.2 times as long."""
    stage = [math.floor(math.log(max(x, 1) / 50) / math.log(1.2) + 1e-6) for x in (t - 1, t)]
    return t <= 3 or (t <= 50 and t % 10 == 0) or (t > 50 and stage[1] > stage[0])


def update_moments(own: dict[str, Tensor], g: Tensor, of: list[int], kept: float) -> None:
    """The average of ``G G^T / n`` of every axis, or of its diagonal."""
    for i in of:
        x = g.movedim(i, 0).flatten(1)
        if f"moment{i}" in own:
            own[f"moment{i}"] = kept * own[f"moment{i}"] + (1 - kept) * x @ x.mT / x.shape[1]
        else:
            own[f"diag{i}"] = kept * own[f"diag{i}"] + (1 - kept) * x.square().mean(1)


def root(moment: Tensor, power: float) -> Tensor:
    """``(A / mean of its diagonal + 1e-4)^power``; units without gradients are mixed with none."""
    mean, eye = moment.diagonal().mean(), torch.eye(len(moment), dtype=moment.dtype)
    values, vectors = torch.linalg.eigh(moment / (mean if mean > 0 else 1) + 1e-4 * eye)
    result = (vectors * values.clamp(min=1e-4) ** power) @ vectors.mT
    seen = moment.diagonal() > 0
    return torch.where(torch.outer(seen, seen) | (eye > 0), result, 0)


# ----------------------------------------------------------------------------------------------- steps
def along(x: Tensor, axis: int, vector: Tensor) -> Tensor:
    """A tensor times a number for each unit of an axis."""
    return (x.movedim(axis, -1) * vector).movedim(-1, axis)


def correction(step: Tensor) -> Tensor:
    """What ``m / sqrt(v)`` is to be multiplied by at an age."""
    return (1 - BETA2**step).sqrt() / (1 - auto_lr.BETA1**step)


def fan_in(symmetry: Symmetry, name: str) -> int:
    """How many numbers each row reads."""
    spec = symmetry.specs[name]
    return math.prod(d for d, r in zip(spec.shape, spec.roles, strict=True) if is_read(r))


def unit(rows: int, fan_in: int, columns: int) -> float:
    """The norm of a usual step of a matrix."""
    return 0.2 * (512 / fan_in) ** 0.25 * max(rows, fan_in) ** 0.5 * 0.9 * min(rows, columns) ** 0.5


def size_and_decay(
    symmetry: Symmetry, name: str, w: Tensor, t: Tensor, total_steps: Number | None
) -> dict[str, Tensor]:
    """By the size of weights in the frame: what steps are multiplied by, and the share of the weights that decays."""
    thin = kind(symmetry, name) == "thin"
    if not all(b.kind == "matrix" for b in symmetry.blocks[name]):
        return {"size": 0 * t + 2, "decay": 0 * t}
    reads = math.prod(w.shape[1:]) if thin else fan_in(symmetry, name)
    size = (w.square().mean().sqrt() * reads**0.5 / 0.5).clamp(0.1, 1.0)
    if thin or not w.any():
        return {"size": size, "decay": 0 * t}
    bias = any(n == name for n in joined(symmetry, tuple(symmetry.specs)).values())
    shapes = [x.shape for x in symmetry.split(name, w)]
    norm = math.sqrt(sum(many * unit(rows, columns, columns + bias) ** 2 for many, rows, columns in shapes))
    share = 0.025 * (512 / reads) ** 0.25 * auto_lr.decay_scale(t, total_steps)
    return {"size": size, "decay": share * norm * size / w.norm()}


def vector_step(
    symmetry: Symmetry, name: str, own: dict[str, Tensor], momentum: Tensor, loudest: Tensor, warmup: float
) -> Tensor:
    """Adam's direction of vectors, of embeddings (with v of rank one) and of thin matrices (turned in the warm-up)."""
    d, square = own["m"] * correction(own["step"]), own["mean_square"]
    if kind(symmetry, name) == "table":
        for i in axes(symmetry, name):
            d = along(d, i, (own[f"diag{i}"] / square.clamp(min=TINY) + 1e-16).rsqrt())
        return d / square.clamp(min=TINY).sqrt()
    adam = d / (own["v"] + 1e-16 * square).clamp(min=TINY).sqrt()
    if not all(b.kind == "matrix" for b in symmetry.blocks[name]):
        return adam * (square > (256 * torch.finfo(d.dtype).eps) ** 2 * loudest)
    if whitened(symmetry, name) and warmup > 0 and adam.norm() > 0:
        for i in whitened(symmetry, name):
            momentum = torch.tensordot(own[f"root{i}"], momentum, ([1], [i])).movedim(0, i)
        turned = torch.lerp(adam, momentum * adam.norm() / momentum.norm(), warmup)
        return turned * adam.norm() / turned.norm()
    return adam


def seen_rows(symmetry: Symmetry, name: str, own: dict[str, Tensor]) -> Tensor:
    """1 for the rows of a matrix that have had a gradient, 0 for the others: only those decay."""
    x = torch.ones_like(own["m"])
    for i in axes(symmetry, name):
        if not is_read(symmetry.specs[name].roles[i]):
            x = along(x, i, (own[f"moment{i}"].diagonal() if f"moment{i}" in own else own[f"diag{i}"]) > 0)
    return x


def matrix_step(symmetry: Symmetry, name: str, bias: str | None, g: Weights, state: State, beta1: Tensor) -> Weights:
    """``P polar(P n P) P`` of a matrix and of its bias at unit rate."""
    own, roles, roots = state[name], symmetry.specs[name].roles, whitened(symmetry, name)
    n = {k: beta1 * state[k]["m"] + (1 - beta1) * g[k] for k in ([name] if bias is None else [name, bias])}

    def times(n: Weights, root: Tensor, axis: int) -> Weights:
        of = [name] if is_read(roles[axis]) else list(n)
        return n | {k: torch.tensordot(root, n[k], ([1], [axis if k == name else 0])) for k in of}

    def whiten(n: Weights) -> Weights:
        for i in roots:
            n = times(n, own[f"root{i}"], i)
            n[name] = n[name].movedim(0, i)
        return n

    for i in set(axes(symmetry, name)) - set(roots):
        v = own[f"diag{i}"]
        small = (v / v.mean().clamp(min=TINY) + 1e-8) ** -0.25
        of = [name] if is_read(roles[i]) else list(n)
        n |= {k: along(n[k], i if k == name else 0, small) for k in of}
    if bias is not None:
        n[bias] = 3 * n[bias]

    def matrices(n: Weights) -> list[Tensor]:
        parts = [symmetry.split(k, x) for k, x in n.items()]
        return [torch.cat(blocks, -1) for blocks in zip(*parts, strict=True)]

    def tensors(parts: list[Tensor]) -> Weights:
        found = {name: symmetry.merge(name, [x if bias is None else x[..., :-1] for x in parts])}
        return found if bias is None else found | {bias: symmetry.merge(bias, [x[..., -1:] for x in parts])}

    parts = matrices(whiten(tensors([newton_schulz(x, 4) for x in matrices(whiten(n))])))
    for k, x in enumerate(parts):
        norm = torch.linalg.matrix_norm(x, keepdim=True).clamp(min=TINY)
        parts[k] = unit(x.shape[1], x.shape[2] - (bias is not None), x.shape[2]) * x / norm
    d = tensors(parts)
    return d if bias is None else d | {bias: 3 * state[bias]["snr"] * d[bias]}
