"""What HELD_OUT's data and networks claim, against slow references; and the graphs and experts of TRAIN."""

import itertools
import math

import networkx
import pytest
import torch
from torch.testing import assert_close

from tasks import experts, relations, streams
from tasks.held_out import algorithms, dynamics, graphs, images, languages, signals, spaces, tables


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_spanning_trees_and_triangles_are_counted():
    graph = networkx.Graph([(0, 1), (1, 2), (2, 0), (2, 3), (3, 4), (4, 2)])
    edges = list(graph.edges)
    trees = sum(networkx.is_tree(graph.edge_subgraph(part)) for part in itertools.combinations(edges, len(graph) - 1))
    _, log_trees, _, log_triangles, degree = graphs.invariants(graph)
    assert_close(log_trees, math.log(trees))
    assert_close(log_triangles, math.log(3.0))
    assert degree == 4


def test_graph_networks_do_not_mind_the_order_of_nodes():
    x, _ = graphs.atlas()
    order = torch.randperm(graphs.NODES, generator=seeded(0))
    model = graphs.gat_atlas().model
    assert_close(model(x[:5][:, order][:, :, order]), model(x[:5]), rtol=1e-4, atol=1e-5)
    for source in (relations.Spreading(8, 2), relations.Communities(8, 3)):
        x, _ = source.sample(seeded(1), 4)
        n, f = source.nodes, source.features
        order = torch.randperm(n, generator=seeded(2))
        columns = torch.cat([order, torch.arange(n, n + f)])
        for kind in relations.LAYERS:
            network = relations.GraphNetwork(n, f, f, kind=kind, width=8, depth=2, activation="tanh", norm=True)
            assert_close(network(x[:, order][:, :, columns]), network(x)[:, order], rtol=1e-4, atol=1e-5)


def test_what_spreads_keeps_to_the_edges():
    """A node without neighbours keeps its value, and in a pair the step is the one that is stated."""
    source = relations.Spreading(3, 1, radius=0.3, rate=0.2)
    x, y = source.sample(seeded(0), 400)
    edges, start = x[..., :3], x[..., 3:]
    assert torch.equal(edges, edges.transpose(1, 2)) and not edges.diagonal(dim1=1, dim2=2).any()
    alone = edges.sum(-1) == 0
    assert 100 < alone.sum() < 1200
    assert_close(y[alone], 2 * start[alone])
    pair = (edges.sum((-2, -1)) == 2).nonzero()[0, 0]
    a, b = edges[pair].sum(-1).nonzero().flatten().tolist()
    v, w = start[pair, a], start[pair, b]
    for _ in range(8):
        v, w = v + 0.2 * (torch.tanh(2 * w) - v), w + 0.2 * (torch.tanh(2 * v) - w)
    assert_close(y[pair, a], 2 * v)


def test_communities_are_joined_as_often_as_said():
    source = relations.Communities(12, 3, inside=0.8, across=0.1)
    x, y = source.sample(seeded(0), 2000)
    edges, known = x[..., :12], x[..., 12:]
    same = (y.unsqueeze(1) == y.unsqueeze(2)) & ~torch.eye(12, dtype=torch.bool)
    assert abs(edges[same].mean() - 0.8) < 0.01 and abs(edges[y.unsqueeze(1) != y.unsqueeze(2)].mean() - 0.1) < 0.01
    assert not edges.diagonal(dim1=1, dim2=2).any()
    shown = known.sum(-1) == 1
    assert abs(shown.float().mean() - 1 / 3) < 0.01 and torch.equal(known.argmax(-1)[shown], y[shown])


@pytest.mark.parametrize("gate", experts.GATES)
def test_a_mixture_is_the_weighted_sum_of_its_experts(gate):
    mixture = experts.Mixture(4, 3, experts=2, hidden=[5], activation="relu", gate=gate)
    x = torch.randn(6, 4, generator=seeded(0))
    weights = experts.GATES[gate](mixture.gate(x))
    expected = sum(weights[:, i : i + 1] * expert(x) for i, expert in enumerate(mixture.experts))
    assert_close(mixture(x), expected)


def test_each_region_has_its_teacher():
    teachers = tuple(streams.TeacherClasses(6, (8,), 4, "tanh", seed=s) for s in (5, 6))
    x, y = experts.Regions(teachers).sample(seeded(0), 500)
    planes = torch.randn(6, 2, generator=seeded(5))
    region = (x @ planes).argmax(1)
    for i, teacher in enumerate(teachers):
        assert torch.equal(y[region == i], teacher.answers(x[region == i]).argmax(1)) and (region == i).sum() > 50


def test_two_experts_of_a_token_share_all_of_its_weight():
    layer = algorithms.Experts(6, 5, 4)
    x = torch.randn(3, 2, 6, generator=seeded(0))
    for token, out in zip(x.flatten(0, 1), layer(x).flatten(0, 1), strict=True):
        logits, which = layer.gate(token).topk(2)
        share = logits.softmax(0)
        assert_close(out, sum(s * layer.experts[int(i)](token) for s, i in zip(share, which, strict=True)))


def test_expressions_have_their_values():
    names = [max, min, lambda *v: sorted(v)[(len(v) - 1) // 2], lambda *v: sum(v) % 10]
    x, y = algorithms.expressions(seeded(0), 300)
    for tokens, value in zip(x.tolist(), y.tolist(), strict=True):
        arguments = []
        for i in range(1, 17, 4):
            head, *rest = tokens[i : i + 4]
            arguments.append(head if head < 10 else names[head - 10](*rest))
            assert head >= 10 or rest == [algorithms.BLANK] * 3
        assert names[tokens[0] - 10](*arguments) == value


def test_recalled_values_are_those_of_the_keys_but_for_the_wrong_ones():
    x, y = algorithms.recall(seeded(0), 500)
    pairs, asked = x[:, : 2 * algorithms.PAIRS].unflatten(1, (-1, 2)), x[:, 2 * algorithms.PAIRS :]
    found = [[dict(p)[key] - algorithms.KEYS for key in a] for p, a in zip(pairs.tolist(), asked.tolist(), strict=True)]
    right = (torch.tensor(found) == y).float().mean()
    assert abs(right - (1 - algorithms.WRONG * (1 - 1 / algorithms.VALUES))) < 0.02


def test_sorted_symbols_are_in_the_secret_order():
    x, y = algorithms.unsorted(seeded(0), 50)
    rank = algorithms.ORDER.argsort()
    given, before = x.split(algorithms.LENGTH, 1)
    assert torch.equal(rank[y], rank[given].sort(1).values) and torch.equal(before[:, 1:], y[:, :-1])


def test_fields_obey_their_equation():
    f, u = (x[:, 0].double() for x in images.fields(seeded(0), 3))
    n = images.CELLS
    wave = 2 * math.pi * torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
    laplace = torch.fft.ifft2(-(wave.square()[:, None] + wave.square()) * torch.fft.fft2(u)).real
    left = -laplace + images.SCREENING * u + images.CUBIC * u.pow(3)
    assert_close(left / 300, f, rtol=1e-3, atol=1e-3)


def test_fronts_obey_their_equation():
    """Against many small steps of the equation itself on a fine grid."""
    x, y = dynamics.fronts(seeded(0), 2)
    start, place, time = x.double().split([dynamics.SENSORS, dynamics.POINTS, dynamics.POINTS], 1)
    spectrum = torch.fft.rfft(start)
    n, steps = 192, 4000
    h = torch.fft.irfft(spectrum, n) * n / dynamics.SENSORS
    wanted = (time * steps).round().long()
    found = torch.zeros_like(y, dtype=torch.float64)
    for step in range(steps + 1):
        at = (place * n).round().long() % n
        found = torch.where(wanted == step, h.gather(1, at), found)
        ahead, behind = h.roll(-1, 1), h.roll(1, 1)
        slope, curve = (ahead - behind) * n / 2, (ahead - 2 * h + behind) * n**2
        h = h + (dynamics.VISCOSITY * curve + dynamics.GROWTH / 2 * slope.square()) / steps
    assert (found - y).abs().mean() < 0.05 * y.std()  # the grid is 1/192 of the circle


def test_the_volume_of_couplings_is_that_of_their_jacobian():
    model = tables.Couplings(5, 8, 3).double()
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=seeded(0)) / 2)
    x = torch.randn(5, generator=seeded(1), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x)[:-1], x)
    assert_close(model(x)[-1], jacobian.det().abs().log())


def test_the_quantiles_of_the_data_have_the_least_pinball_loss():
    y = torch.randn(20_000, generator=seeded(0))
    best = y.quantile(torch.tensor(tables.LEVELS))
    least = tables.quantile_loss(best.expand(len(y), 3), y)
    for shift in (-0.1, 0.1):
        assert tables.quantile_loss((best + shift).expand(len(y), 3), y) > least


def test_light_is_absorbed_as_by_a_homogeneous_medium():
    density, colour = torch.full((64, 1), 0.7), torch.ones(64, 3)
    assert_close(spaces.composite(density, colour, 3 / 64), torch.full((3,), 1 - math.exp(-0.7 * 3)))


def test_a_denoiser_that_knows_the_patch_has_no_loss():
    """The given and the asked-for together are the patch: preconditioning loses nothing."""
    x, y = images.noisy_patches(images.mountains(), seeded(0), 6)
    s = torch.exp(4 * x[:, 1:])
    size = (1 + s.square()).sqrt()
    clean = x[:, :1] / size + y * s / size
    assert_close(clean.mean((-2, -1)), torch.zeros(6, 1), rtol=0, atol=1e-4)
    noise = (x[:, :1] * size - clean) / s
    assert abs(noise.std() - 1) < 0.1


@pytest.mark.parametrize("make", [languages.llama_python, languages.tcn_names])
def test_language_models_do_not_look_ahead(make):
    task = make()
    x, _ = task.batch(seeded(0))
    changed = x.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 30
    before, after = task.model(x), task.model(changed)
    assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 1e-3


def test_retention_is_the_recurrence_that_it_stands_for():
    """S_t = decay S_(t-1) + k_t v_t, out_t = q_t S_t, head by head."""
    layer = algorithms.Retention(8, 2).double()
    x = torch.randn(1, 5, 8, generator=seeded(0), dtype=torch.float64)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (2, 0))
    near = x + layer.near(padded).transpose(1, 2)
    q, k, v = (part[0].unflatten(-1, (2, 4)) for part in (layer.q(near), layer.k(near), layer.v(x)))
    heads = []
    for head in range(2):
        state, outputs = torch.zeros(4, 4, dtype=torch.float64), []
        for t in range(5):
            state = (1 - 2.0 ** (-4 - head)) * state + torch.outer(k[t, head], v[t, head])
            outputs.append(q[t, head] @ state / 2)
        heads.append(layer.norm(torch.stack(outputs)))
    expected = layer.proj(torch.nn.functional.silu(layer.gate(x[0])) * torch.cat(heads, -1))
    assert_close(layer(x)[0], expected)


def test_the_weather_is_that_of_lorenz():
    """The noise is small beside the change from one observation to the next, which the equation gives."""
    series = signals.weather(500)
    assert series.shape == (signals.VARIABLES, 500) and abs(series.std() - 1) < 0.3
    state = torch.full((signals.VARIABLES,), signals.FORCING)
    assert_close(signals.lorenz_rate(state), torch.zeros_like(state))


def test_a_cart_that_is_pushed_moves_that_way():
    state = torch.zeros(2, 4)
    after = dynamics.push(state, torch.tensor([0, 1]))
    assert after[0, 1] < 0 < after[1, 1] and after[1, 3] < 0 < after[0, 3]
    assert torch.equal(after[:, [0, 2]], state[:, [0, 2]])  # Euler's rule: places first move by the old speeds
