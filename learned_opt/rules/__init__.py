"""The table of update rules. One line is one rule; every rule inherits the whole test contract."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from learned_opt.checkpoint import CheckpointError, load_weights
from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.rules.classic import SGD, Adam, Muon
from learned_opt.rules.nfn import NFN
from learned_opt.rules.nominal import DecayingPolar, Nominal
from learned_opt.rules.paced import Paced

SHIPPED = Path(__file__).parent.parent / "checkpoints"

RULES: dict[str, Callable[[], UpdateRule]] = {
    "nfn": NFN,  # the learned rule
    "nfn-permutation": partial(NFN, frame=False),  # without the frame: permutations and signs only
    "nfn-parameter": partial(NFN, pool=False),  # without pooling: every parameter by itself
    "nfn-alone": partial(NFN, frame=False, pool=False),  # neither: what a rule without any symmetry sees
    "paced": Paced,  # NFNOpt's default: nominal steps at a rate that it measures
    "nominal": Nominal,  # what the learned rules start from
    "nominal-frameless": partial(Nominal, frame=False),
    "polar": DecayingPolar,
    "adam": Adam,
    "sgd": SGD,
    "muon": Muon,
}

__all__ = [
    "RULES",
    "State",
    "UpdateRule",
    "Weights",
    "make_rule",
]


def make_rule(rule: str | Path | UpdateRule) -> UpdateRule:
    """A rule with its theta: by name (with the theta that the package ships for it), from a file, or as it is.

    Args:
        rule: a name in :data:`RULES`, the path of a ``.safetensors`` theta (see
            :func:`learned_opt.checkpoint.save_weights`), or a rule.

    Raises:
        ValueError: neither a known name nor a ``.safetensors`` path.
        CheckpointError: the file is missing, damaged, or holds the theta of another rule.
    """
    if isinstance(rule, UpdateRule):
        return rule
    name = str(rule)
    if name in RULES:
        shipped = SHIPPED / f"{name}.safetensors"
        return _with_theta(shipped) if shipped.is_file() else RULES[name]()
    if name.endswith(".safetensors"):
        return _with_theta(Path(rule))
    raise ValueError(f"unknown rule {name!r}: use one of {', '.join(RULES)}, or the path of a .safetensors theta.")


def _with_theta(path: Path) -> UpdateRule:
    name, theta, _ = load_weights(path)
    if name not in RULES:
        raise CheckpointError(path, f"it holds theta of rule {name!r}; known rules: {', '.join(RULES)}.")
    rule = RULES[name]()
    expected = {n: tuple(p.shape) for n, p in rule.named_parameters()}
    found = {n: tuple(t.shape) for n, t in theta.items()}
    if expected != found:
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise CheckpointError(path, f"its tensors {', '.join(wrong)} do not fit rule {name!r} of this version.")
    rule.load_state_dict(theta)
    return rule
