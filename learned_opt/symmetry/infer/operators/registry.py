"""The table of operators."""

from collections.abc import Callable
from typing import Any

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def register_rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: ``rule(engine, *args, **kwargs)`` says what operators of these names do, without their overload.

    The arguments are those of the operator, tensors being :class:`~learned_opt.symmetry.infer.engine.Value`; the result
    is a Value, or a list of what the operator returns. ``engine.meta`` is the fake tensor (or tensors) of the result.
    Raise :class:`~learned_opt.symmetry.infer.engine.UnknownOperator` for a variant that is not covered.
    """

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register
