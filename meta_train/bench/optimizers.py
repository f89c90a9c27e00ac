"""The optimizers that are compared: how to make each, and the learning rates to choose from.

A factory is ``(model, lr, steps) -> (optimizer, scheduler or None)``. Settings are the defaults of the packages; those
that are not torch's come from their authors (Prodigy, Schedule-Free) or from pytorch-optimizer (Lion, SOAP), all in the
extra ``benchmark``.
"""

import contextlib
import copy
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from learned_opt.checkpoint import digest
from learned_opt.rules.directions import has_bfloat16
from learned_opt.rules.newton_schulz import newton_schulz
from learned_opt.symmetry.infer import infer_symmetry
from meta_train.bench.jobs import short_hash
from meta_train.errors import UnknownName
from tasks.transformer import Transformer

Made = tuple[torch.optim.Optimizer, LRScheduler | None]
MakeOptimizer = Callable[..., Made]


# ---------------------------------------------------------------------------------------- factories


def of_torch(make: Callable[..., torch.optim.Optimizer], **settings: Any) -> MakeOptimizer:
    """``make(parameters, lr, **settings)`` at a constant rate."""

    def factory(model: nn.Module, lr: float, steps: int) -> Made:
        return make(model.parameters(), lr, **settings), None

    return factory


sgdm = of_torch(torch.optim.SGD, momentum=0.9)
adam = of_torch(torch.optim.Adam)
adamw = of_torch(torch.optim.AdamW)  # weight decay 0.01
nadam = of_torch(torch.optim.NAdam)
rmsprop = of_torch(torch.optim.RMSprop)


class Muon(torch.optim.Muon):
    """torch's Muon; on a processor without products in bfloat16, where torch's take ten times as long, in float32."""

    def step(self, closure=None):
        devices = {p.device for group in self.param_groups for p in group["params"]}
        if all(map(has_bfloat16, devices)):
            return super().step(closure)
        with mock.patch("torch.optim._muon._zeropower_via_newtonschulz", _in_float32):
            return super().step(closure)


def _in_float32(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    return newton_schulz(x.float()[None], steps)[0]


def muon(model: nn.Module, lr: float, steps: int):
    """Muon on the hidden matrices, AdamW at the same rate (the updates' RMS match) on all else."""
    hidden = hidden_matrices(model)
    matrices = [p for name, p in model.named_parameters() if name in hidden]
    others = [p for name, p in model.named_parameters() if name not in hidden]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr)]
    if matrices:
        parts.append(Muon(matrices, lr, weight_decay=0.01, nesterov=True, adjust_lr_fn="match_rms_adamw"))
    return Joined(parts), None


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the 2-D weights that are neither the first nor the last layer, nor embeddings.

    Layers are the weights with two or more axes in the order in which the model registers them; a
    bare parameter of a transformer (positions) is no layer.
    """
    named = model.named_parameters(remove_duplicate=False)  # a head that is tied to the embedding is the last layer
    layers = [(name, p) for name, p in named if p.ndim >= 2 and name.rpartition(".")[2] == "weight"]
    embeddings = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    return {name for name, p in layers[1:-1] if p.ndim == 2 and name not in embeddings}


class Joined(torch.optim.Optimizer):
    """Several optimizers, each for its own parameters, that step (and are scheduled) as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([p for o in parts for g in o.param_groups for p in g["params"]], {})
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure=None):
        if closure is not None:
            raise ValueError("Joined optimizers take no closure: call backward() before step().")
        for part in self.parts:
            part.step()


def of_package(package: str, name: str, **settings: Any) -> MakeOptimizer:
    """As :func:`of_torch`, for a class of a package that is imported when it is needed."""

    def factory(model: nn.Module, lr: float, steps: int) -> Made:
        make = getattr(importlib.import_module(package), name)
        return make(model.parameters(), lr=lr, **settings), None

    return factory


lion = of_package("pytorch_optimizer", "Lion", weight_decay=0.01)
soap = of_package("pytorch_optimizer", "SOAP")
schedule_free = of_package("schedulefree", "AdamWScheduleFree")
prodigy = of_package("prodigyopt", "Prodigy")


def cosine(factory: MakeOptimizer) -> MakeOptimizer:
    """The same optimizer with its rate decayed to zero along a half cosine over the run."""

    def decayed(model: nn.Module, lr: float, steps: int):
        optimizer, _ = factory(model, lr, steps)
        return optimizer, CosineAnnealingLR(optimizer, T_max=steps)

    return decayed


def learned(
    model: nn.Module,
    lr: None,
    steps: int | None,
    rule: Any,
    symmetry: Any = "infer",
    factor: float = 1.0,
    with_total_steps: bool = True,
):
    """NFNOpt with a rule at ``factor`` times its rate, given the symmetry and, if ``with_total_steps``, the steps."""
    from learned_opt import NFNOpt

    total_steps = steps if with_total_steps else None
    return NFNOpt(model.named_parameters(), symmetry=symmetry, lr=factor, total_steps=total_steps, rule=rule), None


# -------------------------------------------------------------------------------------- the table


class Entry(NamedTuple):
    """How to make an optimizer, the learning rates to choose from (None: nothing to tune), the package that it needs,
    and whether it is given ``total_steps`` where it could use them."""

    factory: MakeOptimizer
    grid: tuple[float, ...] | None
    needs: str | None = None
    with_total_steps: bool = True


def half_decades(low: float, high: float) -> tuple[float, ...]:
    """Learning rates a factor sqrt(10) apart, from 10**low to 10**high."""
    return tuple(float(f"{10 ** (k / 2):.3g}") for k in range(round(2 * low), round(2 * high) + 1))


OPTIMIZERS: dict[str, Entry] = {
    "adam": Entry(adam, half_decades(-4, -1)),
    "adam-cosine": Entry(cosine(adam), half_decades(-4, -1)),
    "adamw": Entry(adamw, half_decades(-4, -1)),
    "adamw-cosine": Entry(cosine(adamw), half_decades(-4, -1)),
    "nadam": Entry(nadam, half_decades(-4, -1)),
    "nadam-cosine": Entry(cosine(nadam), half_decades(-4, -1)),
    "rmsprop": Entry(rmsprop, half_decades(-4.5, -1.5)),
    "rmsprop-cosine": Entry(cosine(rmsprop), half_decades(-4.5, -1.5)),
    "sgdm": Entry(sgdm, half_decades(-3, 0.5)),
    "sgdm-cosine": Entry(cosine(sgdm), half_decades(-3, 0.5)),
    "muon": Entry(muon, half_decades(-4, -1)),
    "muon-cosine": Entry(cosine(muon), half_decades(-4, -1)),
    "lion": Entry(lion, half_decades(-5, -2), "pytorch_optimizer"),
    "lion-cosine": Entry(cosine(lion), half_decades(-5, -2), "pytorch_optimizer"),
    "soap": Entry(soap, half_decades(-4, -1), "pytorch_optimizer"),
    "soap-cosine": Entry(cosine(soap), half_decades(-4, -1), "pytorch_optimizer"),
    "schedule-free": Entry(schedule_free, half_decades(-3.5, -0.5), "schedulefree"),  # has no schedule, by design
    # Prodigy estimates its own rate and multiplies it by lr: 1 is its default.
    "prodigy": Entry(prodigy, half_decades(-1.5, 1.5), "prodigyopt"),
    "prodigy-cosine": Entry(cosine(prodigy), half_decades(-1.5, 1.5), "prodigyopt"),
}
DEFAULT = "nfn:auto_lr"  # what nfnopt is: NFNOpt with its default rule


@lru_cache(maxsize=64)
def optimizer_named(name: str) -> tuple[Entry, str]:
    """The entry of a name, and for NFNOpt the hash of what it does ("" for the others).

    ``nfnopt`` is NFNOpt as it is, ``nfn:RULE`` with that rule: a name in ``learned_opt.rules.RULES`` or a checkpoint.
    At the end of both ``@lr=0.3`` multiplies its rate, ``@without-total-steps`` leaves those out.
    """
    if name in OPTIMIZERS:
        entry = OPTIMIZERS[name]
        if entry.needs and importlib.util.find_spec(entry.needs) is None:
            raise UnknownName(
                f"optimizer {name!r} needs the package {entry.needs}, which is not installed. "
                "Run `pip install 'learned-opt[benchmark]'`, or leave it out."
            )
        return entry, ""
    kind, _, rule = re.sub("^nfnopt(?=@|$)", DEFAULT, name).partition(":")
    if kind != "nfn" or not rule:
        raise UnknownName(
            f"unknown optimizer {name!r}. Valid names: {', '.join(OPTIMIZERS)}, nfnopt, "
            "nfn:RULE (a rule's name or the path of a .safetensors file); LABEL=NAME renames one."
        )
    from learned_opt.rules import RULES, make_rule

    options = []
    while "@" in rule and not Path(rule).is_file():  # paths may have one, too
        rule, _, option = rule.rpartition("@")
        options.append(option)
    settings: dict[str, Any] = dict(map(_option, options))
    if rule not in RULES and not Path(rule).is_file():
        raise UnknownName(
            f"unknown rule {rule!r}. Valid rules: {', '.join(RULES)}, or the path of an existing .safetensors file."
        )
    try:
        module = make_rule(rule)
    except ValueError as error:  # a damaged file, or one for another version of the rule
        raise UnknownName(f"optimizer {name!r}: {error}") from error
    theta = "@".join([rule_fingerprint(module), *sorted(options)])
    with_total_steps = settings.get("with_total_steps", True)
    return Entry(partial(learned, rule=module, **settings), None, with_total_steps=with_total_steps), theta


def _option(text: str) -> tuple[str, float | bool]:
    if text == "without-total-steps":
        return "with_total_steps", False
    if text.startswith("lr="):
        with contextlib.suppress(ValueError):
            factor = float(text.removeprefix("lr="))
            if 0 < factor < math.inf:
                return "factor", factor
    raise UnknownName(
        f"unknown option @{text} of NFNOpt: use @lr=NUMBER, positive and finite, or @without-total-steps."
    )


LATE = 60  # steps by which rules have begun all that they do


def rule_fingerprint(rule: nn.Module) -> str:
    """Hash of theta and of what the rule does to small networks, so that a change of either (new
    weights, or new code around the same weights) is a new optimizer.

    In float64, so that all digits that are hashed are the same in any order of summation; on networks that have every
    kind of weight, scale and bias, with and without a horizon: three steps down the gradient, and on one of them many
    along gradients that do not depend on its weights (those would magnify rounding), one of them wild: rules measure.
    """
    networks = _fingerprint_networks()
    runs = [(*network, steps, 3, True) for network in networks for steps in (4, None)]
    runs += [(*networks[0], steps, LATE, False) for steps in (96, None)]
    moved = [
        f"{name} {float((p.detach() - start).norm()):.6e}"
        for model, inputs, steps, count, down in runs
        for name, p, start in _trained(model, inputs, rule, steps, count, down)
    ]
    theta = dict(rule.state_dict())
    return short_hash(*moved, *([digest(theta)] if theta else []))


def _fingerprint_networks() -> list[tuple[nn.Module, Tensor]]:
    images = torch.linspace(-1, 1, 8 * 36, dtype=torch.float64).sin().reshape(8, 1, 6, 6)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(36, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    cnn = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten())
    words = torch.arange(30).reshape(6, 5).square() % 11
    transformer = Transformer(nn.Embedding(11, 8), 5, 11, width=8, heads=2, depth=1, hidden=12, causal=True)
    return [(mlp, images), (cnn, images), (transformer, words)]


def _trained(
    model: nn.Module, inputs: Tensor, rule: nn.Module, steps: int | None, count: int, down: bool
) -> list[tuple[str, Tensor, Tensor]]:
    """Steps of a copy of the model from weights that no default explains, down the gradient of a loss or along random
    ones: each parameter and its start."""
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    start = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) / 3 for n, p in _named(model)}
    load_weights(model, start)
    symmetry = infer_symmetry(model, inputs, verify=False)
    optimizer, _ = learned(model, None, steps=steps, rule=rule, symmetry=symmetry)
    for step in range(count):
        optimizer.zero_grad()
        if down:
            model(inputs).square().mean().backward()
        else:
            for _, p in _named(model):
                wild = 10.0 if step == LATE - 10 else 1.0
                p.grad = wild * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return [(name, p, start[name]) for name, p in _named(model)]


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy into the parameters of a model; raises ValueError unless the names are the same."""
    params = dict(model.named_parameters())
    if params.keys() != weights.keys():
        raise ValueError(
            f"task.init gave weights {sorted(weights)}, but task.model has {sorted(params)}. "
            "A task's init must name every parameter of its model."
        )
    for name, param in params.items():
        param.copy_(weights[name])
