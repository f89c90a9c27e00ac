"""One contract for all families and suites; then the initial weights, the models and the errors."""

import ast
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap
from torch.testing import assert_close

import tasks
from tasks import conv, data, mlp, suites, transformer
from tasks.init import Sin, initializers
from tasks.task import Problem, Supervised, TaskError, check_ceiling, check_losses, mean_squared_error

FAMILY_DRAWS = 3
MAKERS = {
    f"train:{name}:{seed}": lambda family=family, seed=seed: family(seeded(seed))
    for name, family in suites.TRAIN.items()
    for seed in range(FAMILY_DRAWS)
}
CONCRETE = suites.VALID | suites.STREAMING | suites.STREAMING_LATER
MAKERS |= {f"concrete:{name}": make for name, make in CONCRETE.items()}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=sorted(MAKERS))
def task(request):
    return MAKERS[request.param]()


def stack(trees):
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def small(batch, n=4):
    return tuple(part[:n] for part in batch)


def double(tree):
    return {name: x.double() for name, x in tree.items()}


def double_batch(batch):
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


# ---------------------------------------------------------------------------------- the contract


def test_initial_weights_have_the_names_and_shapes_of_the_model(task):
    weights = task.init(seeded(0))
    expected = {name: p.shape for name, p in task.model.named_parameters()}
    assert {name: w.shape for name, w in weights.items()} == expected
    assert list(weights) == list(expected)
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values())


def test_the_model_keeps_no_state(task):
    assert not list(task.model.buffers())


def test_everything_random_comes_from_the_generator(task):
    def draw(seed, global_seed):
        torch.manual_seed(global_seed)
        g = seeded(seed)
        return [*task.init(g).values(), *task.batch(g), *task.batches(g, 2)]

    first, again, other = draw(1, 1), draw(1, 2), draw(2, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    matrices = [i for i, a in enumerate(first) if a.ndim > 1]
    assert all(not torch.equal(first[i], other[i]) for i in matrices)


def test_a_task_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for make in MAKERS.values():
        make().init(seeded(0))
    assert torch.equal(before, torch.get_rng_state())


def test_initial_loss_is_on_the_scale_of_the_ceiling(task):
    losses = [float(task.loss(task.init(seeded(s)), task.train_eval())) for s in range(3)]
    assert all(0.7 * task.ceiling < loss < 3 * task.ceiling for loss in losses), losses


def test_every_parameter_has_a_gradient(task):
    """But for the bias of the keys, to which softmax is blind."""
    g = seeded(0)
    gradients = grad(task.loss)(task.init(g), task.batch(g))
    zero = [n for n, x in gradients.items() if not (x.isfinite().all() and x.abs().max() > 1e-7)]
    assert [name for name in zero if not name.endswith("attn.k.bias")] == []


def test_batches_are_n_batches_of_the_same_distribution(task):
    batch, many = task.batch(seeded(0)), task.batches(seeded(1), 5)
    for one, all_of_them in zip(batch, many, strict=True):
        assert all_of_them.shape == (5, *one.shape)
        assert all_of_them.dtype == one.dtype
    assert len(batch[0]) == task.batch_size
    x = task.batches(seeded(2), 1 + 1000 // task.batch_size)[0].flatten(0, 1).float()
    y = task.batches(seeded(3), 1 + 1000 // task.batch_size)[0].flatten(0, 1).float()
    assert abs(x.mean() - y.mean()) < 0.1 * x.std()
    assert not torch.equal(many[0][0], many[0][1])


def test_fixed_batches_are_fixed_and_bounded(task):
    for batch in (task.held_out, task.train_eval):
        assert all(torch.equal(a, b) for a, b in zip(batch(), batch(), strict=True))
        assert 0 < len(batch()[0]) <= 1024
        assert batch()[0].shape[1:] == task.batch(seeded(0))[0].shape[1:]


def test_vmapped_loss_and_gradient_are_those_of_the_loop(task):
    """Over stacked weights and stacked batches, as meta-training runs them."""
    g = seeded(0)
    weights = [task.init(g) for _ in range(2)]
    batches = small(task.batches(g, 2), 2)
    batches = tuple(part[:, :6] for part in batches)
    one = [(w, tuple(part[i] for part in batches)) for i, w in enumerate(weights)]
    assert_close(vmap(task.loss)(stack(weights), batches), torch.stack([task.loss(w, b) for w, b in one]))
    together = vmap(grad(task.loss))(stack(weights), batches)
    apart = stack([grad(task.loss)(w, b) for w, b in one])
    assert_close(together, apart, rtol=1e-3, atol=1e-5)


def test_second_derivatives_are_right(task):
    """grad of |grad|^2 / 2 along a direction is the difference quotient, vmapped too."""
    g = seeded(0)
    weights, batch = double(task.init(g)), double_batch(small(task.batch(g)))
    direction = {n: torch.randn(w.shape, generator=g).double() for n, w in weights.items()}
    norm = sum(x.square().sum() for x in direction.values()).sqrt()
    direction = {n: x / norm for n, x in direction.items()}  # a short step, to cross no kink

    def half_square(w):
        return sum(x.square().sum() for x in grad(task.loss)(w, batch).values()) / 2

    eps = 1e-7
    ahead, behind = (half_square({n: w + sign * eps * direction[n] for n, w in weights.items()}) for sign in (1, -1))
    second = grad(half_square)(weights)
    slope = sum((second[n] * direction[n]).sum() for n in weights)
    assert_close(slope, (ahead - behind) / (2 * eps), rtol=1e-3, atol=1e-5)
    vmapped = vmap(grad(half_square))(stack([weights, weights]))
    assert_close({n: x[1] for n, x in vmapped.items()}, second)


@pytest.mark.parametrize("name", sorted(CONCRETE))
def test_adam_learns_in_thirty_steps(name):
    task = CONCRETE[name]()
    g = seeded(0)
    weights = {n: w.requires_grad_() for n, w in task.init(g).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=3e-3)
    with torch.no_grad():
        before = float(task.loss(weights, task.train_eval()))
    for _ in range(30):
        optimizer.zero_grad()
        task.loss(weights, task.batch(g)).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(task.loss(weights, task.train_eval())) < 0.97 * before


# ------------------------------------------------------------------------------------ the suites


def matrices(task) -> set[tuple[int, ...]]:
    """Shapes of all weights but vectors."""
    return {tuple(p.shape) for p in task.model.parameters() if p.ndim > 1}


@pytest.mark.slow
def test_no_matrix_of_valid_or_held_out_has_a_shape_that_train_samples():
    g = seeded(0)
    sampled = set().union(*(matrices(f(g)) for f in suites.TRAIN.values() for _ in range(200)))
    assert len(sampled) > 100
    for name, make in (suites.VALID | suites.HELD_OUT).items():
        assert matrices(make()).isdisjoint(sampled), name


def test_suites_have_the_promised_kinds_and_sizes():
    valid = [make() for make in suites.VALID.values()]
    assert len(suites.VALID) >= 9
    assert all(400 <= task.steps <= 800 for task in valid)
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Embedding, nn.Tanh, nn.GELU, Sin):
        assert any(isinstance(m, kind) for task in valid for m in task.model.modules()), kind
    assert any(torch.equal(*task.held_out()) for task in valid if task.name.startswith("auto"))
    assert [task.name for task in valid] == list(suites.VALID)
    for suite in suites.SUITES.values():
        assert [make().name for make in suite.values()] == list(suite)


@pytest.mark.parametrize("name", sorted(suites.TRAIN))
@given(seed=st.integers(0, 2**40))
@settings(max_examples=5, deadline=None)
def test_a_family_is_a_function_of_its_generator(name, seed):
    one, two = (suites.TRAIN[name](seeded(seed)) for _ in range(2))
    assert repr(one) == repr(two)
    low, high = (100, 2000) if name.startswith("stream") else (200, 1000)
    assert low <= one.steps <= high
    batch = one.batch(seeded(0))
    assert float(one.loss(one.init(seeded(0)), batch)) == float(two.loss(two.init(seeded(0)), batch))


def test_families_vary():
    g = seeded(0)
    for family in suites.TRAIN.values():
        assert len({repr(family(g)) for _ in range(20)}) == 20


def test_tasks_does_not_know_the_optimizer():
    for file in Path(tasks.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("learned_opt", "meta_train")]


# --------------------------------------------------------------------------------- initial weights


def test_initial_scale_multiplies_the_matrices_alone():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    one = {n: draw(seeded(5)) for n, draw in initializers(model).items()}
    two = {n: draw(seeded(5)) for n, draw in initializers(model, scale=2.0).items()}
    for name in one:
        assert_close(two[name], one[name] * (2.0 if one[name].ndim > 1 else 1.0))


@given(fan_in=st.integers(30, 200), seed=st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_linear_weights_have_the_default_distribution(fan_in, seed):
    draws = initializers(nn.Linear(fan_in, 200))
    for draw, count in ((draws["weight"], 200 * fan_in), (draws["bias"], 200)):
        w = draw(seeded(seed)) * fan_in**0.5  # uniform on [-1, 1]
        assert w.abs().max() <= 1
        assert abs(w.square().mean() - 1 / 3) < 6 * (4 / 45 / count) ** 0.5


def test_sines_keep_the_variance():
    sizes = [256] * 6
    model = mlp.mlp(sizes, "sin")
    g = seeded(0)
    model.load_state_dict({n: draw(g) for n, draw in initializers(model).items()})
    x = torch.randn(500, 256, generator=g)
    hidden = model[:8](x)  # after four sines
    assert 0.4 < hidden.detach().std() < 0.8  # sin of N(0, 1): 0.66; default weights give 0.03


def test_template_is_the_same_each_time():
    one, two = (suites.VALID["char"]().model.state_dict() for _ in range(2))
    assert_close(one, two, rtol=0, atol=0)


# --------------------------------------------------------------------------------------- the models


def test_attention_is_the_same_fused_and_separate_and_as_torch_computes_it():
    g = seeded(0)
    fused = transformer.Attention(12, 3, causal=True, fused=True)
    apart = transformer.Attention(12, 3, causal=True, fused=False)
    for i, name in enumerate("qkv"):
        linear = getattr(apart, name)
        linear.weight.data = fused.qkv.weight.data[12 * i : 12 * (i + 1)]
        linear.bias.data = fused.qkv.bias.data[12 * i : 12 * (i + 1)]
    apart.proj.load_state_dict(fused.proj.state_dict())
    x = torch.randn(2, 5, 12, generator=g)
    reference = nn.MultiheadAttention(12, 3, batch_first=True)
    reference.in_proj_weight.data, reference.in_proj_bias.data = fused.qkv.weight, fused.qkv.bias
    reference.out_proj.load_state_dict(fused.proj.state_dict())
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    assert_close(apart(x), fused(x))
    assert_close(reference(x, x, x, attn_mask=mask)[0], fused(x))


def test_the_language_model_does_not_look_ahead():
    task = suites.VALID["char"]()
    x, _ = task.batch(seeded(0))
    changed = x.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 97
    before, after = task.model(x), task.model(changed)
    assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 1e-3


@given(
    size=st.sampled_from([8, 12]),
    channels=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    norm=st.booleans(),
    pool=st.sampled_from(["max", "avg"]),
    head=st.sampled_from(["flatten", "average"]),
)
@settings(max_examples=20, deadline=None)
def test_cnn_shapes(size, channels, norm, pool, head):
    model = conv.cnn((2, size, size), channels, 7, "tanh", norm=norm, pool=pool, head=head)
    assert model(torch.randn(3, 2, size, size)).shape == (3, 7)
    assert type(model) is nn.Sequential


def test_model_errors():
    with pytest.raises(ValueError, match="multiple of 3 heads"):
        transformer.Attention(16, 3, causal=False, fused=True)
    with pytest.raises(ValueError, match="flatten"):
        conv.cnn((1, 8, 8), [4], 10, "relu", head="mean")


def test_a_task_is_a_model_data_and_a_loss():
    """The concrete task needs nothing of the families: linear regression, solved."""
    x = torch.randn(64, 3, generator=seeded(0))
    source = data.Rows(x, x @ torch.tensor([[1.0], [2.0], [3.0]]), x[:4], x[:4, :1], 0)
    task = Supervised("linear", lambda: nn.Linear(3, 1), source, batch_size=8, steps=1, loss=mean_squared_error)
    weights = {"weight": torch.tensor([[1.0, 2.0, 3.0]]), "bias": torch.zeros(1)}
    assert float(task.loss(weights, task.batch(seeded(1)))) < 1e-10


def problem(**options):
    settings = {"sample": lambda generator, count: (torch.rand(count, 2, generator=generator),), **options}

    def loss(model, x):
        return model(x).square().mean()

    return Problem("mine", lambda: nn.Linear(2, 1), loss=loss, batch_size=3, steps=5, **settings)


@pytest.mark.parametrize("wrong", [{"x": torch.ones(2, 2)}, torch.ones(2, 2), (), [3.0]])
def test_examples_that_are_no_tensors_are_refused(wrong):
    task = problem(sample=lambda generator, count: wrong)
    for draw in (task.train_eval, task.held_out, lambda: task.batch(seeded(0)), lambda: task.batches(seeded(0), 2)):
        with pytest.raises(TaskError, match="task 'mine': sample must return a tuple of tensors"):
            draw()
    with pytest.raises(TaskError, match="held_out must return"):
        problem(held_out=lambda: wrong).held_out()


def test_a_list_of_tensors_will_do():
    task = problem(sample=lambda generator, count: [torch.rand(count, 2, generator=generator)])
    assert task.batch(seeded(0))[0].shape == (3, 2) and task.batches(seeded(0), 4)[0].shape == (4, 3, 2)


def test_losses_and_ceilings_below_zero_are_refused():
    check_ceiling(problem(ceiling=2.0))
    for ceiling in (0.0, -2.0, math.nan, math.inf):
        with pytest.raises(TaskError, match="task 'mine': its ceiling"):
            check_ceiling(problem(ceiling=ceiling))
    check_losses(problem(ceiling=2.0), torch.tensor([0.0, 3.0, -1e-7, math.nan, math.inf, -math.inf]))
    with pytest.raises(TaskError, match="task 'mine' has a loss of -0.25"):
        check_losses(problem(ceiling=2.0), torch.tensor([[math.nan, 3.0], [-0.25, 0.0]]))
