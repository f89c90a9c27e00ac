"""Whole runs with numbers of theta changed, and the search for the best ones."""

import pytest
import torch
from torch import nn

from learned_opt.rules import RULES
from meta_train.errors import UsageError
from meta_train.search import Result, Results, Runs, Search, best_of, changes, drawn, made, with_numbers
from meta_train.surface import Surface
from tasks.task import Problem

RULE = RULES["learned"]().requires_grad_(False)
ALL = Search(slopes=True).places(RULE)


class Network(nn.Module):
    """A matrix of every role, a thin one, and vectors."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 12), nn.Linear(12, 12), nn.LayerNorm(12)
        self.c, self.thin = nn.Linear(12, 6), nn.Linear(12, 2)

    def forward(self, x):
        x = self.norm(self.b(self.a(x).relu()).relu())
        return torch.cat([self.c(x), self.thin(x)], -1)


def sample(generator, count):
    x = torch.rand(count, 8, generator=generator)
    return x, x.square()


def loss(model, x, y):
    return (model(x) - y).square().mean()


FAMILIES = {"squares": lambda generator: Problem("squares", Network, sample, loss, batch_size=16, steps=20)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_number_has_a_place_of_its_own():
    assert len({(name, index) for name, index in ALL.values()}) == len(ALL) > len(Search().places(RULE)) > 5
    theta = dict(RULE.named_parameters())
    for name, index in ALL.values():
        assert float(theta[name][index]) == 0


def test_numbers_go_to_their_places_alone():
    at = torch.randn(3, len(ALL), generator=seeded())
    theta = with_numbers(RULE, ALL, at)
    for (name, index), column in zip(ALL.values(), at.T, strict=True):
        assert torch.equal(theta[name][(slice(None), *index)], column)
    none = with_numbers(RULE, ALL, torch.zeros(len(ALL)))
    assert all(torch.equal(none[n], p.detach()) for n, p in RULE.named_parameters())


def test_zero_is_the_hand_made_rule_and_copies_are_paired():
    task = FAMILIES["squares"](seeded())
    places = Search().places(RULE)
    points = torch.zeros(2, 3, len(places))
    points[:, 2, list(places).index("gain: matrix")] = -1.5  # steps of 0.4 of the size
    train, held_out = changes(RULE, places, task, 40, points, seeded(1))
    assert train.shape == held_out.shape == (3, 2)
    assert not train[0].any() and train[1].abs().max() < 1e-3  # but for rounding
    assert train[2].mean() > 0.1 and train[2].abs().min() > 1e-2


def test_every_number_does_something():
    task = FAMILIES["squares"](seeded())
    points = torch.cat([torch.zeros(1, len(ALL)), torch.eye(len(ALL))])[None]
    _, held_out = changes(RULE, ALL, task, 60, points, seeded(1))
    idle = [n for n, change in zip(ALL, held_out[1:, 0].tolist(), strict=True) if abs(change) < 1e-4]
    assert idle == ["gain: embedding"]  # of which the network has none


def test_points_are_drawn_about_the_best_so_far():
    search, at = Search(copies=400), tuple([0.3] * 11)
    points = drawn(search, Runs("search", 1, 0, at, 0.1), seeded())
    assert not points[:, 0].any()
    assert torch.equal(points[:, 1], torch.tensor([at, at]))
    others = points[:, 2:].flatten(0, 1) - 0.3
    assert others.mean().abs() < 0.01 and others.std() == pytest.approx(0.1 / 2**0.5, rel=0.1)
    judged = drawn(search, Runs("judge", 0, 0, at, 0.0), seeded())
    assert judged.shape == (2, 2, 11) and not judged[:, 0].any() and (judged[:, 1] == torch.tensor(at)).all()


def test_a_job_is_the_same_wherever_it_is_made():
    search, job = Search(copies=3, runs=1, horizon=(5, 9)), Runs("search", 2, 1, (0.1,) * 11, 0.2)
    one, two = (made(search, lambda: FAMILIES, job) for _ in range(2))
    assert one[:5] == two[:5] and 5 <= one.steps <= 9
    assert made(search, lambda: FAMILIES, Runs("search", 3, 1, (0.1,) * 11, 0.2)).points != one.points


def synthetic(search, best, rounds=3):
    """Results of runs whose changes are a bowl about ``best``, with the noise of the hand-made run in common."""
    done = []
    for k in range(rounds):
        for i in range(search.tasks):
            job = Runs("search", k, i, (0.0,) * len(best), search.spread_in(k))
            points = drawn(search, job, seeded(100 * k + i)).transpose(0, 1)  # [copies, runs, numbers]
            change = 0.3 * ((points - best).square().sum(-1) - best.square().sum())
            change[1:] += 0.1 * torch.randn(search.runs, generator=seeded(i))
            done.append((job, Result("a", 9, points.flatten(0, 1).tolist(), change.flatten().tolist(), [], 1.0)))
    return done


def test_the_best_numbers_are_found_and_no_farther_than_runs_were():
    search = Search()
    best = 0.3 * torch.tensor([1.0, -1.0, 0.5, 0, 0, 0, 0, 0, 0, 0, 0])
    found, expected = best_of(search, synthetic(search, best))
    assert torch.tensor(found).allclose(best, atol=0.06) and expected < 0
    far, _ = best_of(search, synthetic(search, 10 * best))
    reach = search.spread_in(2) * (len(best) / 2) ** 0.5
    assert torch.tensor(far).norm() == pytest.approx(reach, rel=0.02)
    assert torch.nn.functional.cosine_similarity(torch.tensor(far), best, 0) > 0.9


def test_the_fit_is_told_which_points_share_a_hand_made_run(monkeypatch):
    search, told = Search(tasks=3, runs=2), {}

    class Spy(Surface):
        def __init__(self, points, changes, task, **options):
            told.update(task=task, run=options["run"])
            super().__init__(points, changes, task, **options)

    monkeypatch.setattr("meta_train.search.Surface", Spy)
    best_of(search, synthetic(search, torch.zeros(11), rounds=2))
    run, task = told["run"].view(6, search.copies, 2), told["task"].view(6, search.copies, 2)
    assert (run == run[:, :1]).all() and run[:, 0].unique().numel() == 12  # of each round and task two
    assert (task == task[:, :1, :1]).all() and task[:, 0, 0].unique().numel() == 6


def test_a_points_numbers_made_its_change():
    """The order of runs and copies in what is stored."""
    search, job = Search(copies=6, runs=3), Runs("search", 0, 0, (0.0,) * 11, 0.4)
    result = made(search, lambda: FAMILIES, job)
    points, changed = torch.tensor(result.points), torch.tensor(result.train).abs() > 1e-3
    assert torch.equal(points.any(1), changed)
    assert points.any(1).sum() == 12 and not points[:6].any()  # of copies 0 and 1, of all runs


def test_families_take_turns_and_lengths_are_drawn():
    two = {"b": FAMILIES["squares"], "a": lambda g: Problem("a", Network, sample, loss, batch_size=8, steps=7)}
    search = Search(copies=2, runs=1, tasks=3)
    jobs = [Runs("search", 1, k, (0.0,) * 11, 0.1) for k in range(3)]
    assert [(r.name, r.steps) for r in (made(search, lambda: two, j) for j in jobs)] == [
        ("squares", 20),
        ("a", 7),
        ("squares", 20),
    ]
    with pytest.raises(UsageError, match="'a' draws no task but 3"):
        made(search, lambda: {"a": lambda g: 3}, jobs[0])


def test_results_are_read_as_they_were_written(tmp_path):
    job, result = Runs("search", 0, 1, (), 0.1), Result("a", 10, [[0.5, 0.25]], [-0.5], [0.125], 2.0)
    Results(tmp_path / "runs.jsonl").add(job, result)
    assert Results(tmp_path / "runs.jsonl").runs == {job.key: result}
