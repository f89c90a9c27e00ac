"""One contract for every task of SEEN and HELD_OUT, without a data folder: nothing here needs a file."""

import copy
import hashlib
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

from meta_train.bench.curves import run
from meta_train.bench.optimizers import learned
from meta_train.bench.suites import task_fingerprint
from meta_train.symmetries import symmetry_of
from tasks import held_out, suites

VALUES_OF_SYMMETRY = 1e-9  # relative change of the loss in float64
HASH_OF_HELD_OUT = "529bcb5fefa0f9e7d6ee1f90973380ee74600c25c3ab0ec4ea078697287b724c"


MAKERS = suites.SEEN | suites.HELD_OUT


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in suites.SEEN]  # what it can teach was learned


@pytest.fixture(scope="module", params=[*SLOW, *suites.HELD_OUT])
def task(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LEARNED_OPT_DATA", raising=False)
        yield MAKERS[request.param]()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def small(batch, n=4):
    return tuple(part[:n] for part in batch)


def double(batch):
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


def test_initial_weights_are_those_of_the_model_and_of_the_generator_alone(task):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = task.init(seeded(0))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = task.init(seeded(0)), task.init(seeded(1))
    assert {n: w.shape for n, w in one.items()} == {n: p.shape for n, p in task.model.named_parameters()}
    assert list(one) == [n for n, _ in task.model.named_parameters()]
    assert all(w.dtype == torch.float32 and w.isfinite().all() and not w.requires_grad for w in one.values())
    assert all(torch.equal(one[n], again[n]) for n in one)
    drawn = [n for n, w in one.items() if w.ndim > 1 and not torch.equal(w[0], w[-1])]
    assert drawn and all(not torch.equal(one[n], other[n]) for n in drawn)


def test_the_model_keeps_no_state_and_calls_of_it_are_alike(task):
    assert not list(task.model.buffers())
    x = task.held_out()[0][:4]
    with torch.no_grad():
        assert torch.equal(task.model(x), task.model(x))
        assert torch.equal(task.model(x), functional_call(task.model, dict(task.model.named_parameters()), (x,)))


def test_batches_come_from_the_generator_alone(task):
    def draw(seed, global_seed):
        torch.manual_seed(global_seed)
        g = seeded(seed)
        return [*task.batch(g), *task.batches(g, 3)]

    first, again, other = draw(1, 1), draw(1, 2), draw(2, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    one, three = task.batch(seeded(0)), task.batches(seeded(0), 3)
    assert all(b.shape == (3, *a.shape) and a.dtype == b.dtype for a, b in zip(one, three, strict=True))
    assert len(one[0]) == task.batch_size


def test_fixed_batches_are_fixed_bounded_and_not_the_same(task):
    held, train = task.held_out(), task.train_eval()
    for batch, again in ((held, task.held_out()), (train, task.train_eval())):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
        assert 0 < len(batch[0]) <= 1024
        assert all(len(part) == len(batch[0]) for part in batch)
    assert all(a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in zip(held, train, strict=True))
    rows = {tuple(row) for row in train[0].flatten(1).tolist()}
    overlap = [row for row in held[0].flatten(1).tolist() if tuple(row) in rows]
    assert len(overlap) <= 0.03 * len(held[0])  # two documents may begin alike


def test_a_task_is_the_same_each_time_it_is_made(task, monkeypatch):
    monkeypatch.delenv("LEARNED_OPT_DATA", raising=False)
    again = MAKERS[task.name]()
    assert again.name == task.name and 500 <= task.steps <= 2000
    assert task_fingerprint(again) == task_fingerprint(task)


def test_initial_loss_is_on_the_scale_of_the_ceiling(task):
    losses = [float(task.loss(task.init(seeded(s)), task.train_eval())) for s in range(2)]
    assert all(0.5 * task.ceiling < loss < 3 * task.ceiling for loss in losses), (task.ceiling, losses)


def test_every_parameter_has_a_gradient(task):
    """But for the bias of the keys, to which softmax is blind."""
    g = seeded(0)
    gradients = grad(task.loss)(task.init(g), task.batch(g))
    zero = [n for n, x in gradients.items() if not (x.isfinite().all() and x.abs().max() > 1e-8)]
    assert [name for name in zero if not name.endswith(("attn.k.bias", "qkv.bias"))] == []


def test_vmapped_gradient_is_that_of_the_loop(task):
    g = seeded(0)
    weights = [task.init(g) for _ in range(2)]
    batches = tuple(part[:, :3] for part in task.batches(g, 2))
    together = vmap(grad(task.loss))({n: torch.stack([w[n] for w in weights]) for n in weights[0]}, batches)
    for i, w in enumerate(weights):
        apart = grad(task.loss)(w, tuple(part[i] for part in batches))
        for name, expected in apart.items():
            size = expected.abs().max().clamp(min=1e-3)
            assert_close(together[name][i] / size, expected / size, rtol=0, atol=2e-3, msg=name)


def test_adam_learns_in_twenty_steps(task):
    g = seeded(0)
    weights = {n: w.requires_grad_() for n, w in task.init(g).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=3e-3)
    evaluation = small(task.train_eval(), 256)
    with torch.no_grad():
        before = float(task.loss(weights, evaluation))
    for _ in range(20):
        optimizer.zero_grad()
        task.loss(weights, task.batch(g)).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(task.loss(weights, evaluation)) < 0.99 * before


def test_the_inferred_symmetry_is_exact_and_its_halves_are_not(task):
    """The loss itself, derivatives and rollouts included, on held-out examples at random weights, in float64."""
    symmetry, g = symmetry_of(task), seeded(0)
    assert symmetry.notes == () and symmetry.summary()["covered"] > 0.8
    symmetry.validate(dict(task.model.named_parameters()))
    batch = double(small(task.held_out(), 8))
    weights = {
        n: (w + 0.3 * w.abs().mean() * torch.randn(w.shape, generator=g)).double() for n, w in task.init(g).items()
    }
    element = symmetry.sample(g, scale_range=(0.5, 2.0))
    moved = symmetry.act(element, weights)
    loss = task.loss(weights, batch)
    assert abs(task.loss(moved, batch) / loss - 1) < VALUES_OF_SYMMETRY
    matrix = max((n for n in weights if not torch.equal(moved[n], weights[n])), key=lambda n: weights[n].numel())
    alone = task.loss({**weights, matrix: moved[matrix]}, batch)
    assert abs(alone / loss - 1) > 1e-7, matrix


@pytest.mark.parametrize("rule", ["auto_lr", pytest.param("learned", marks=pytest.mark.slow)])
def test_the_optimizer_and_the_evaluation_take_it(task, rule):
    """In ten steps: after the first two, of the largest rate, the topic model's exp(log variance) may be huge."""
    short = copy.copy(task)
    short.steps = 10
    short.train_eval, short.held_out = (partial(small, batch(), 32) for batch in (task.train_eval, task.held_out))
    make = partial(learned, lr=None, rule=rule, symmetry=symmetry_of(task))
    curve = run(short, make, 0, 10)
    assert not curve.diverged and curve.ran == 10 and all(torch.tensor(curve.held_out).isfinite())


def test_the_suites_are_broad_and_of_different_tasks():
    assert len(suites.SEEN) >= 16 and len(suites.HELD_OUT) >= 14
    names = [name for suite in suites.SUITES.values() if suite is not suites.STREAMING for name in suite]
    assert len(names) == len(set(names))
    streams = [name for name in suites.HELD_OUT if name.startswith("stream")]
    assert len(streams) >= 5


def test_held_out_has_large_networks():
    sizes = [sum(p.numel() for p in make().model.parameters()) for make in suites.HELD_OUT.values()]
    assert sum(size >= 300_000 for size in sizes) >= 4


def test_the_code_of_held_out_is_as_it_was_committed():
    """Results on HELD_OUT belong to this code: before its first report put the hash that fails here in place of the old
    one; after a report a change asks for its runs anew, and experiments/README.md has to say what was changed and why.
    """
    files = sorted(Path(held_out.__file__).parent.glob("*.py"))
    text = "\n".join(f"{file.name}\n{file.read_text(encoding='utf-8')}" for file in files)
    assert hashlib.sha256(text.encode()).hexdigest() == HASH_OF_HELD_OUT


def test_the_data_folder_is_looked_up_when_a_task_is_made(tmp_path, monkeypatch):
    monkeypatch.delenv("LEARNED_OPT_DATA", raising=False)
    assert suites.seen().keys() == suites.SEEN.keys()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        suites.seen(tmp_path / "nowhere")
    monkeypatch.setenv("LEARNED_OPT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="LEARNED_OPT_DATA"):
        suites.SEEN["word-transformer"]()
