"""What the models of tasks claim to be: equivariance, recurrences, bounds and equations against slow references."""

import csv
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence
from torch.testing import assert_close

from meta_train.bench import curves, optimizers
from meta_train.symmetries import symmetry_of
from tasks import data, documents, fields, generative, graph, policy, recurrent, residual, sequence, suites, transformer
from tasks.mlp import Gated
from tasks.task import Problem


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------- multivectors


def orthogonal(seed, determinant):
    q, _ = torch.linalg.qr(normal(3, 3, seed=seed))
    return q * determinant * torch.linalg.det(q)


def on_multivectors(matrix):
    """What a linear map of vectors does to all blades: minors of the matrix, [8, 8]."""
    image = torch.zeros(8, 8, dtype=matrix.dtype)
    for i, a in enumerate(graph.BLADES):
        for j, b in enumerate(graph.BLADES):
            if len(a) == len(b):
                rows, columns = [k - 1 for k in a], [k - 1 for k in b]
                image[i, j] = torch.linalg.det(matrix[rows][:, columns]) if a else 1.0
    return image


def test_the_geometric_product_is_that_of_the_table_and_the_table_is_the_algebra():
    x, y, z = normal(3, 4, 5, 8)
    table = graph.CAYLEY.double()
    assert_close(graph.geometric_product(x, y), torch.einsum("...i,...j,ijk->...k", x, y, table))
    product = graph.geometric_product
    assert_close(product(product(x, y), z), product(x, product(y, z)))
    u, v = (nn.functional.pad(w, (1, 4)) for w in normal(2, 6, 3))
    both = product(u, v) + product(v, u)
    assert_close(both, nn.functional.pad(2 * (u * v).sum(-1, keepdim=True), (0, 7)))


def test_weights_of_the_product_are_per_triple_of_grades():
    x, y, w = normal(5, 8), normal(5, 8, seed=1), normal(5, graph.PATHS, seed=2)
    grades = torch.tensor(graph.GRADES)
    triples = sorted({tuple(int(grades[n]) for n in ijk) for ijk in graph.CAYLEY.nonzero()})
    assert len(triples) == graph.PATHS == 20
    expected = 0.0
    for path, (a, b, c) in enumerate(triples):
        pick = lambda z, grade: z * (grades == grade)  # noqa: E731
        expected = expected + w[:, path, None] * pick(graph.geometric_product(pick(x, a), pick(y, b)), c)
    assert_close(graph.geometric_product(x, y, w), expected)


@pytest.mark.parametrize("determinant", [1, -1])
def test_the_clifford_network_is_equivariant_to_rotations_reflections_and_translations(determinant):
    torch.manual_seed(0)
    model = graph.CliffordGraph(6, 2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = graph.bodies(seeded(1), 4).double()
    matrix, shift = orthogonal(2, determinant), normal(3, seed=3)

    def moved(matrix):
        charge, position, velocity = x.split([1, 3, 3], -1)
        return torch.cat([charge, position @ matrix.T + shift, velocity @ matrix.T], -1)

    y = model(x)
    assert (y - x[..., 1:4]).abs().max() > 0.1
    assert_close(model(moved(matrix)), y @ matrix.T + shift, rtol=0, atol=1e-10)
    stretch = matrix @ torch.diag(torch.tensor([1.3, 1.0, 1.0], dtype=torch.float64))
    assert (model(moved(stretch)) - (y @ stretch.T + shift)).abs().max() > 1e-2
    order = torch.tensor([3, 1, 4, 0, 2])
    assert_close(model(x[:, order]), y[:, order])


@pytest.mark.parametrize("layer", [graph.GradeLinear(4, 4), graph.GradeGate(4), graph.ProductLayer(4)])
def test_every_clifford_layer_is_equivariant_on_all_grades(layer):
    layer, x = layer.double(), normal(3, 4, 8)
    act = on_multivectors(orthogonal(4, -1)).T
    assert_close(layer(x @ act), layer(x) @ act)


def test_the_bodies_obey_mechanics():
    start = graph.bodies(seeded(0), 20).double()
    end, finer = graph.simulate(start, 1.0, 100), graph.simulate(start, 1.0, 400)
    assert_close(end[..., 4:].sum(1), start[..., 4:].sum(1))  # momentum
    assert_close(end, finer, rtol=0, atol=1e-2)

    def energy(s):
        gap = (s[:, :, None, 1:4] - s[:, None, :, 1:4]).square().sum(-1)
        potential = s[..., :1] * s[..., :1].transpose(1, 2) / (gap + 0.1).sqrt()
        return s[..., 4:].square().sum((1, 2)) / 2 + potential.sum((1, 2)) / 2

    assert_close(energy(finer), energy(start), rtol=0, atol=1e-2)


# ------------------------------------------------------------------------------------ sequences


@given(length=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_scan_is_the_sum_over_the_past(length, seed):
    decay, given_ = normal(2, 2, length, 3, seed=seed)
    h = sequence.linear_scan(decay, given_)
    for t in range(length):
        terms = [decay[:, s + 1 : t + 1].prod(1) * given_[:, s] for s in range(t + 1)]
        assert_close(h[:, t], torch.stack(terms).sum(0))


def block():
    torch.manual_seed(0)
    return sequence.Selective(width=6, inner=8, state=3, rank=2).double()


def test_the_selective_block_is_its_recurrence_step_by_step():
    model, u = block(), normal(2, 7, 6)
    x, z = model.fan(u).chunk(2, -1)
    past = nn.functional.pad(x, (0, 0, 3, 0))
    kernel = model.conv.weight[:, 0]
    x = torch.stack([(past[:, t : t + 4] * kernel.T).sum(1) + model.conv.bias for t in range(7)], 1)
    x = nn.functional.silu(x)
    h, outputs = torch.zeros(2, 8, 3, dtype=torch.float64), []
    for t in range(7):
        low, write, read = model.select(x[:, t]).split([2, 3, 3], -1)
        delta = nn.functional.softplus(model.delta(low))
        for n in range(3):
            a = -model.log_a[:, n].exp()
            h[..., n] = torch.exp(delta * a) * h[..., n].clone() + delta * write[:, n : n + 1] * x[:, t]
        y = torch.einsum("bdn,bn->bd", h, read) + model.skip * x[:, t]
        outputs.append(model.out(y * nn.functional.silu(z[:, t])))
    assert_close(model(u), torch.stack(outputs, 1))


def test_selection_depends_on_the_input():
    model, x = block(), normal(2, 7, 8)
    decay, _, read = model.recurrence(x)
    assert decay.min() > 0 and decay.max() < 1
    assert decay.std(1).min() > 1e-5 and read.std(1).min() > 1e-2
    with torch.no_grad():
        model.delta.weight.zero_()
    assert model.recurrence(x)[0].std(1).max() < 1e-12


@pytest.mark.parametrize("make", ["mamba", "lstm"])
def test_language_models_do_not_look_ahead(make):
    torch.manual_seed(0)
    if make == "mamba":
        model = sequence.Mamba(20, width=6, inner=12, state=3, rank=2, depth=2)
    else:
        model = recurrent.Recurrent(nn.Embedding(20, 6), 6, 20, kind="lstm", width=8, depth=2, last=False)
    x = torch.randint(20, (2, 9), generator=seeded(0))
    changed = torch.cat([x[:, :5], (x[:, 5:] + 1) % 20], 1)
    before, after = model(x), model(changed)
    assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-4


def slow_density_weights(points, iterations):
    """The same for one set of points, in loops."""
    n, d = points.shape
    k = [[math.exp(-float((a - b).square().sum()) / (2 * d**0.5)) for b in points] for a in points]
    w = [1 / n] * n
    for _ in range(iterations):
        norm = sum(w[i] * w[j] * k[i][j] for i in range(n) for j in range(n))
        far = [math.sqrt(k[j][j] - 2 * sum(w[i] * k[i][j] for i in range(n)) + norm) for j in range(n)]
        radius = sum(far) / n
        psi = [min(f, radius) / f for f in far]  # of Huber's loss
        w = [p / sum(psi) for p in psi]
    return torch.tensor([n * x for x in w], dtype=torch.float64)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_density_weights_are_those_of_iterative_reweighting(iterations):
    points = normal(2, 6, 3)
    weights = sequence.density_weights(points, iterations)
    assert_close(weights, torch.stack([slow_density_weights(p, iterations) for p in points]))
    assert_close(weights.sum(-1), torch.full((2,), 6.0, dtype=torch.float64))


def test_an_outlier_weighs_less():
    points = torch.cat([0.3 * normal(9, 4), 5 + normal(1, 4)])
    weights = sequence.density_weights(points, 2)
    assert weights[-1] < 0.8 * weights[:-1].min()


def test_robust_attention_is_a_weighted_kernel_regression_and_plain_attention_on_a_sphere():
    torch.manual_seed(0)
    plain = transformer.Attention(8, 2, causal=False, fused=False).double()
    robust = sequence.RobustAttention(8, 2, iterations=0).double()
    robust.load_state_dict(plain.state_dict())
    x = normal(3, 5, 8)
    with torch.no_grad():  # keys of equal norms: the Gaussian kernel of queries and keys is softmax's
        for model in (plain, robust):
            model.k.weight.zero_()
            model.k.bias.fill_(0.5)
    assert_close(robust(x), plain(x))
    robust = sequence.RobustAttention(8, 2, iterations=2).double()
    q, k, v = (robust._split(f(x)) for f in (robust.q, robust.k, robust.v))
    kernel = torch.exp(-(q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1) / (2 * 4**0.5))
    pairs = sequence.density_weights(torch.cat([k, v], -1), 2)
    keys = sequence.density_weights(k, 2)
    heads = torch.einsum("bhqk,bhk,bhkd->bhqd", kernel, pairs, v)
    heads = heads / torch.einsum("bhqk,bhk->bhq", kernel, keys).unsqueeze(-1)
    assert_close(robust(x), robust.proj(heads.transpose(1, 2).flatten(-2)))


# ----------------------------------------------------------------------------------- recurrences


@pytest.mark.parametrize("kind", sorted(recurrent.GATES))
def test_recurrences_are_those_of_torch(kind):
    torch.manual_seed(0)
    mine = recurrent.Recurrence(kind, 3, 5).double()
    make = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.RNN)
    settings_ = {"nonlinearity": kind} if make is nn.RNN else {}
    theirs = make(3, 5, batch_first=True, **settings_).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(mine.input.weight)
        theirs.weight_hh_l0.copy_(mine.hidden.weight)
        theirs.bias_ih_l0.copy_(mine.input.bias)
        theirs.bias_hh_l0.zero_()
    x = normal(2, 6, 3)
    assert_close(mine(x), theirs(x)[0])


@pytest.mark.parametrize("kind", sorted(recurrent.GATES))
def test_signs_and_scales_of_a_recurrence_are_found(kind):
    task = recurrent.row_reader("rows", data.digits(), kind=kind, width=6, batch_size=4, steps=1)
    symmetry = symmetry_of(task)
    assert symmetry.check(task.model, task.held_out()[0][:4]) < 1e-12
    summary = symmetry.summary()
    assert summary["positive_scales" if kind == "relu" else "sign_generators"] == 6


def test_an_unknown_recurrence_is_named():
    with pytest.raises(ValueError, match="lstm"):
        recurrent.Recurrence("elman", 2, 2)


def test_rows_are_read_from_the_top():
    source = recurrent.Rowwise(data.photos(8, (2, 3)))
    images, _ = data.photos(8, (2, 3)).held_out()
    rows, _ = source.held_out()
    assert rows.shape[1:] == source.shape == (8, 24)
    assert_close(rows[0, 2], images[0, :, 2].flatten())


# ------------------------------------------------------------------------------ residual and gated


@pytest.mark.parametrize("name", ["mlp-inputs", "residual-mlp", "resnet", "rnn"])
def test_the_symmetry_of_a_family_is_exact(name):
    task = suites.TRAIN[name](seeded(3))
    symmetry = symmetry_of(task)
    assert symmetry.notes == () and symmetry.summary()["covered"] > 0.95
    assert symmetry.check(task.model, task.held_out()[0][:4]) < 1e-12


def test_a_block_whose_branch_is_zero_is_the_identity():
    dense, conv = residual.DenseBlock(4, 6, "tanh", True), residual.ConvBlock(3, 3, 1, "relu", True)
    with torch.no_grad():
        for p in (dense.down.weight, dense.down.bias, conv.norm2.weight, conv.norm2.bias):
            p.zero_()
    x, image = normal(2, 4).float(), normal(2, 3, 4, 4).float()
    assert_close(dense(x), x)
    assert_close(conv(image), image.relu())


def test_a_stage_of_a_residual_network_halves_the_sides():
    model = residual.resnet(3, 7, channels=[4, 6, 8], blocks=2)
    blocks = [m for m in model if isinstance(m, residual.ConvBlock)]
    assert len(blocks) == 6 and [isinstance(b.skip, nn.Identity) for b in blocks] == [1, 1, 0, 1, 0, 1]
    x = torch.randn(2, 3, 8, 8, generator=seeded(0))
    assert model[:-3](x).shape == (2, 8, 2, 2) and model(x).shape == (2, 7)


def test_a_gated_layer_multiplies_two_linear_maps():
    layer, x = Gated(3, 4, "silu"), torch.randn(5, 3, generator=seeded(0))
    a, b = x @ layer.linear.weight[:4].T, x @ layer.linear.weight[4:].T
    expected = (a + layer.linear.bias[:4]) * nn.functional.silu(b + layer.linear.bias[4:])
    assert_close(layer(x), expected)


# ------------------------------------------------------------------------------------- generative


@given(prior=st.floats(0.1, 20), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_divergence_is_that_of_gaussians(prior, seed):
    mean, log_variance = normal(2, 5, 4, seed=seed)
    exact = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros_like(mean), prior**0.5)).sum(-1)
    assert_close(generative.gaussian_kl(mean, log_variance, prior), exact)


def test_the_autoencoder_loss_is_the_evidence_bound():
    task = generative.image_vae("vae", data.digits(), hidden=12, code=3, activation="tanh", batch_size=6, steps=1)
    x, y = task.batch(seeded(0))
    assert x.shape == (6, 64 + 3) and set(y.flatten().tolist()) == {0.0, 1.0}
    mean, log_variance = task.model.encoder(y).chunk(2, -1)
    posterior = Independent(Normal(mean, (log_variance / 2).exp()), 1)
    z = mean + (log_variance / 2).exp() * x[:, 64:]
    decoder = Independent(Bernoulli(logits=task.model.decoder(z)), 1)
    prior = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
    bound = decoder.log_prob(y) - kl_divergence(posterior, prior)
    weights = dict(task.model.named_parameters())
    assert_close(task.loss(weights, (x, y)), -bound.mean() / 64)


def test_the_topic_model_gives_probabilities_of_words_and_its_loss_is_the_evidence_bound():
    bags = documents.bags(documents.corpus(None), size=80, skip=20)
    task = generative.topic_model("topics", bags, hidden=10, topics=5, batch_size=32, steps=1, alpha=0.5)
    x, y = task.batch(seeded(0))
    log_p, mean, log_variance = task.model(x).split([80, 5, 5], -1)
    assert_close(log_p.exp().sum(-1), torch.ones(32))
    prior = (1 - 2 / 5) / 0.5 + (5 / 0.5) / 5**2
    divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros_like(mean), prior**0.5)).sum(
        -1
    )
    likelihood = log_p.mul(y).sum(-1)
    expected = (divergence - likelihood).mean() / bags.x.sum(1).mean()
    assert_close(task.loss(dict(task.model.named_parameters()), (x, y)), expected)


# ------------------------------------------------------------------------------ fields and policies


def test_the_residual_of_burgers_equation_is_that_of_reverse_derivatives_and_zero_for_a_solution():
    torch.manual_seed(0)
    u = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    points = normal(7, 2).requires_grad_()
    value = u(points)
    (slope,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(slope[:, 0].sum(), points)
    expected = slope[:, 1:] + value * slope[:, :1] - 0.1 * second[:, :1]
    assert_close(fields.burgers_residual(u, points.detach(), 0.1), expected)
    rarefaction = lambda p: p[:, :1] / (1 + p[:, 1:])  # noqa: E731
    points = points.detach().abs()
    assert fields.burgers_residual(rarefaction, points, 0.1).abs().max() < 1e-12
    assert fields.burgers_residual(lambda p: p[:, :1] * p[:, 1:], points, 0.1).abs().max() > 1e-2


def test_the_points_of_burgers_equation_are_where_they_should_be():
    (points,) = fields.burgers_points(seeded(0), 500)
    inside, start, end = points.unbind(1)
    assert inside[:, 0].abs().max() <= 1 and inside[:, 1].min() >= 0 and inside[:, 1].max() <= 1
    assert (start[:, 1] == 0).all() and (end[:, 0].abs() == 1).all()
    assert 0.4 < (end[:, 0] > 0).float().mean() < 0.6


def test_pixels_are_split_and_placed():
    source = fields.pixels(12)
    assert len(source.x) + len(source.held_x) == 144 and len(source.held_x) == 16
    everything = torch.cat([source.x, source.held_x])
    assert len({tuple(p) for p in everything.tolist()}) == 144
    assert everything.abs().max() == 1 and source.y.abs().max() <= 1


def test_sines_keep_the_variance_at_the_initial_weights():
    torch.manual_seed(0)
    model = fields.siren(2, 3, width=128, depth=4)
    x = 2 * torch.rand(400, 2, generator=seeded(0)) - 1
    assert all(0.6 < model[:k](x).std() < 0.8 for k in range(1, 5))  # of a sine of anything wide: sqrt(1/2)


def test_the_pendulum_keeps_its_energy_and_the_policy_its_strength():
    state = normal(50, 2)

    def energy(s):
        return s[:, 1].square() / 6 + policy.GRAVITY / 2 * torch.cos(s[:, 0])

    after = state
    for _ in range(20):
        after = policy.swing(after, torch.zeros(50, 1, dtype=torch.float64))
    assert (energy(after) - energy(state)).abs().max() < 0.2 * policy.GRAVITY
    assert (after - state).abs().max() > 1
    torque = policy.Policy(8, 2, 3.0).double()(100 * state)
    assert torque.shape == (50, 1) and torque.abs().max() <= 3


def test_the_cost_of_a_policy_is_that_of_its_rollouts():
    push = lambda s: 0.5 * torch.ones_like(s[:, :1])  # noqa: E731
    state, total = normal(4, 2), 0.0
    expected = policy.rollout_cost(push, state, 3)
    for _ in range(3):
        total = total + policy.cost(state, push(state)).mean()
        state = policy.swing(state, push(state))
    assert_close(expected, total / 3)
    upright, hanging = torch.zeros(1, 2), torch.tensor([[math.pi, 0.0]])
    still = torch.zeros(1, 1)
    assert policy.cost(upright, still) == 0 < policy.cost(hanging, still)


# ------------------------------------------------------------------------------------- documents


def write_news(folder, rows):
    (folder / "ag_news").mkdir()
    with (folder / "ag_news" / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    documents.corpus.cache_clear()


def test_news_are_read_split_and_counted(tmp_path):
    write_news(tmp_path, [[1 + k % 4, f"A b{k % 5}", "a, b0! c d e f"] for k in range(76)])
    texts = documents.corpus(tmp_path)
    assert len(texts.documents) == 76 and texts.train == 68
    assert texts.documents[1] == ("a", "b1", "a", "b0", "c", "d", "e", "f") and texts.labels[:5] == (0, 1, 2, 3, 0)
    assert list(documents.vocabulary(texts.documents, 3)) == ["a", "b0", "c"]
    windows = documents.word_windows(texts, length=6, size=3)
    assert windows.tokens[:8].tolist() == [0, 1, 0, 1, 2, 3, 3, 3] and windows.classes == 4
    bags = documents.bags(texts, size=5, skip=0)
    assert bags.x[0].tolist() == [2, 2, 1, 1, 1] and len(bags.held_x) == 8
    openings = documents.openings(texts, length=10, size=3)
    assert openings.x[1].tolist() == [2, 1, 2, 3, 4, 1, 1, 1, 0, 0] and openings.classes == 4


def test_a_row_that_is_no_news_is_named(tmp_path):
    write_news(tmp_path, [[1, "title"]])
    with pytest.raises(ValueError, match="class, title and description"):
        documents.corpus(tmp_path)


def test_help_texts_stand_in_for_news(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no AG News"):
        documents.corpus(tmp_path)
    texts = documents.corpus(None)
    assert set(texts.labels[: texts.train]) == set(texts.labels[texts.train :]) == {0, 1, 2, 3}
    assert len(texts.documents) - texts.train == math.ceil(len(texts.documents) / 9)


def test_contamination_hits_words_and_spares_padding_and_the_held_out():
    openings = documents.openings(documents.corpus(None), length=12, size=200)
    noisy = documents.Contaminated(openings, 202, 0.3)
    clean, _ = openings.sample(seeded(0), 2000)
    x, _ = noisy.sample(seeded(0), 2000)
    assert ((x == 0) == (clean == 0)).all() and x.max() < 202
    assert 0.25 < (x != clean)[clean > 0].float().mean() < 0.31
    assert all(torch.equal(a, b) for a, b in zip(noisy.held_out(), openings.held_out(), strict=True))


# --------------------------------------------------------------------------------------- Problem


def test_a_problem_is_a_model_a_batch_function_and_a_loss():
    def sample(generator, count):
        x = torch.randn(count, 3, generator=generator)
        return x, x.sum(1, keepdim=True)

    def loss(model, x, y):
        return (model(x) - y).square().mean()

    task = Problem("sum", lambda: nn.Linear(3, 1), sample, loss, batch_size=8, steps=10)
    solved = {"weight": torch.ones(1, 3), "bias": torch.zeros(1)}
    assert float(task.loss(solved, task.batch(seeded(0)))) < 1e-10
    assert task.ceiling == float(task.loss(task.init(seeded(0)), task.train_eval())) > 0
    assert len(task.held_out()[0]) == 1024 and not torch.equal(task.held_out()[0], task.train_eval()[0])
    assert repr(task) == "Problem('sum', 4 parameters, 10 x 8)"
    fixed = sample(seeded(5), 2)
    kept = Problem(
        "sum", lambda: nn.Linear(3, 1), sample, loss, batch_size=8, steps=1, ceiling=3.0, held_out=lambda: fixed
    )
    assert kept.ceiling == 3.0 and kept.held_out() is fixed


def test_the_documentation_of_tasks_runs():
    page = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    written: dict = {}
    exec(code, written)
    task = written["SUITE"]["sine"]()
    curve = curves.run(task, lambda model, steps: optimizers.adam(model, 0.01, steps), 0, 150)
    assert curve.final_held_out < 0.7 * curve.held_out[0]
