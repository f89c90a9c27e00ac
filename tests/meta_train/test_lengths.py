"""Factors of the parts of theta, fitted on whole runs."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from learned_opt.rules import make_rule
from meta_train import checkpoint
from meta_train.lengths import Lengths, Pairs, best_factors, compare, scaled
from meta_train.loop import train
from meta_train.recipes import RecipeError
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks import suites
from tests.meta_train.test_loop import RECIPE, TABLES, Slow, log_of, run


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_theta(rule, seed=0):
    g = seeded(seed)
    return {n: torch.randn(p.shape, generator=g) for n, p in rule.named_parameters()}


def pairs(change, n=400):
    c = torch.rand(n, 2, generator=seeded(1)) * (torch.rand(n, 2, generator=seeded(2)) > 0.3)
    changes = change(c) + 0.02 * torch.randn(n, generator=seeded(3))
    return [Pairs(*own) for own in zip(c.chunk(8), changes.chunk(8), strict=True)]  # of eight tasks


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: 0.3 * ((c[:, 0] - 0.5) ** 2 - 0.25) + 0.2 * c[:, 1], (0.5, 0.0)),  # half of one alone
        (lambda c: -0.2 * c[:, 0] - 0.1 * c[:, 1], (1.0, 1.0)),
        (lambda c: 0.2 * c[:, 0] + 0.1 * c[:, 1], (0.0, 0.0)),
    ],
)
def test_the_factors_are_those_at_which_runs_end_lowest(change, expected):
    factors, promised = best_factors(pairs(change))
    assert_close(factors, torch.tensor(expected), atol=0.1, rtol=0)
    assert promised == pytest.approx(float(change(factors[None])), abs=0.02)


def test_a_run_that_fails_does_not_decide():
    """Even where the factor is best."""
    wild = pairs(lambda c: -0.2 * c[:, 0])
    wild[0].changes[wild[0].factors[:, 0].argmax()] = 1e6
    assert best_factors(wild)[0][0] > 0.8


def test_factors_multiply_what_their_control_is_read_off_and_nothing_else():
    rule = make_rule("learned")
    theta = random_theta(rule)
    names = list(rule.parts)
    for i, name in enumerate(names):
        factors = torch.ones(2, len(names))
        factors[1, i] = 0.0
        found = scaled(rule, theta, factors)
        rows = dict(rule.parts[name])
        for n, t in theta.items():
            assert torch.equal(found[n][0], t)
            expected = t.clone()
            if n in rows:
                expected[rows[n]] = 0
            assert torch.equal(found[n][1], expected)


def test_without_any_part_a_run_is_that_of_the_hand_made_rule():
    rule = make_rule("learned").requires_grad_(False)
    none = scaled(rule, random_theta(rule), torch.zeros(len(rule.parts)))
    fresh = {n: p for n, p in make_rule("learned").named_parameters() if n.split(".")[0].endswith("_controls")}
    assert all(torch.equal(none[n], p.detach()) for n, p in fresh.items())


def test_pairs_share_weights_and_batches():
    """With theta that does nothing both runs of a pair are the same."""
    rule = make_rule("learned").requires_grad_(False)
    task = suites.TRAIN["mlp-inputs"](seeded(0))
    unroll = Unroll(task, rule, symmetry_of(task), (12, 12), transform="log")
    found = compare(unroll, dict(rule.named_parameters()), Lengths(particles=2, steps=12), seeded(1))
    assert found.factors.shape == (2, len(rule.parts)) and found.changes.abs().max() < 1e-3  # but for rounding
    found = compare(unroll, random_theta(rule), Lengths(particles=2, steps=12), seeded(1))
    assert found.changes.abs().max() > 1e-2


def test_lengths_are_fitted_and_logged(tmp_path):
    """Theta is multiplied by what the log says; validations say how theta has changed what runs end at."""
    run(replace(RECIPE, lr=0.0, ema=0.0), tmp_path)
    lines = log_of(tmp_path)
    fits = [x for x in lines if "factors" in x]
    assert [x["step"] for x in fits] == [2, 4, 6]
    factor = math.prod(x["factors"]["momentum"] for x in fits)
    theta = checkpoint.load(checkpoint.list_all(tmp_path)[-1])["run"]["theta"]
    assert float(theta["momentum"]) == pytest.approx(0.5 * factor, rel=1e-5) and factor < 1
    checks = [x for x in lines if "validation" in x]
    assert checks[0]["change"] == 0.0
    assert checks[-1]["change"] == pytest.approx(checks[-1]["validation"] - checks[0]["validation"])


def test_a_rule_without_parts_has_no_lengths(tmp_path):
    class Whole(Slow):
        parts = {}

    with pytest.raises(RecipeError, match="parts"):
        train(RECIPE, tmp_path, **TABLES | {"rules": {"slow": Whole}})
