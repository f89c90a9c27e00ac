"""The learned rule: what it starts from, what its arithmetic is, what it is pure in, and what it couples."""

import math

import pytest
import torch
from learned_opt.rules.nominal import DecayingPolar, Nominal, schedule
from torch.func import functional_call, grad, vmap
from torch.nn.functional import linear

from learned_opt import features
from learned_opt.rules import RULES
from learned_opt.rules.embedding import broadcast
from learned_opt.rules.nfn import N_ODD, N_TIME, NFN, time_features
from tests.inferred import infer
from tests.states import MODELS, assert_same, every_model, make, noise_like


def at_random(rule, seed=3, size=0.3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(size * torch.randn(p.shape, generator=g))
    return rule.double()


def theta_of(rule):
    return {n: p.detach().clone() for n, p in rule.named_parameters()}


def differs(a, b):
    return {n for n in a if not torch.allclose(a[n], b[n], rtol=1e-6, atol=0)}


# ------------------------------------------------------------------------------------- the start
@every_model
@pytest.mark.parametrize("frame", [True, False])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("total", [None, 50])
def test_with_last_maps_at_zero_it_is_the_nominal_rule(kind, frame, pool, total):
    symmetry, params, grads, state = make(kind)
    rule, nominal = NFN(frame=frame, pool=pool).double(), Nominal(frame=frame)
    nominal.averages = rule.averages
    with torch.no_grad():  # whatever the hidden maps are
        for n, p in rule.named_parameters():
            if n.split(".")[0] not in ("gate", "unit_gain", "layer_gain", "blend"):
                p.add_(torch.randn_like(p))
        ours, theirs = (r(params, grads, state, symmetry, total_steps=total, weight_decay=0.1) for r in (rule, nominal))
    assert_same(ours[0], theirs[0], rtol=1e-12)
    assert_same(ours[1], theirs[1], rtol=0, atol=0)


def test_fresh_theta_is_the_same_every_time_and_has_zero_last_maps():
    first, second = NFN(), NFN()
    assert_same(theta_of(first), theta_of(second), rtol=0, atol=0)
    for n, p in first.named_parameters():
        zero = n.split(".")[0] in ("gate", "unit_gain", "layer_gain", "blend") or n.endswith("bias")
        assert zero == (not p.any())


@pytest.mark.parametrize("name", ["nfn", "nfn-permutation", "nfn-parameter"])
def test_one_theta_serves_every_network(name):
    rule = at_random(RULES[name]())
    theta = {n: p.clone() for n, p in rule.named_parameters()}
    for kind in MODELS:
        symmetry, params, grads, state = make(kind)
        with torch.no_grad():
            updates, after = rule(params, grads, state, symmetry)
        assert {n: u.shape for n, u in updates.items()} == {n: p.shape for n, p in params.items()}
        assert all(u.isfinite().all() and u.any() for u in updates.values())
        assert {n: set(s) for n, s in after.items()} == {n: set(s) for n, s in state.items()}
    assert_same(dict(rule.named_parameters()), theta, rtol=0, atol=0)


# ------------------------------------------------------------------------- vmap, derivatives
@every_model
@pytest.mark.parametrize("over_theta", [False, True])
def test_vmap_over_particles_is_a_loop(kind, over_theta):
    symmetry, params, _, _ = make(kind)
    rule, n = at_random(NFN()), 3
    theta = theta_of(rule)
    if over_theta:
        noise = noise_like(theta, 5, n)
        theta = {k: x + 0.1 * noise[k] for k, x in theta.items()}
    params = {k: p + 0.2 * z for (k, p), z in zip(params.items(), noise_like(params, 6, n).values(), strict=True)}
    grads = [noise_like({k: p[0] for k, p in params.items()}, 7 + t, n) for t in range(2)]
    totals = torch.tensor([10.0, 20.0, 40.0], dtype=torch.float64)

    def two_steps(theta, params, first, second, total):
        state = rule.init(params)
        for g in (first, second):
            u, state = functional_call(rule, theta, (params, g, state, symmetry), {"total_steps": total})
            params = {k: p + u[k] for k, p in params.items()}
        return params, state

    with torch.no_grad():
        together = vmap(two_steps, in_dims=(0 if over_theta else None, 0, 0, 0, 0))(theta, params, *grads, totals)
        for i in range(n):
            pick = lambda tree: {k: x[i] for k, x in tree.items()}  # noqa: B023, E731
            alone = two_steps(
                pick(theta) if over_theta else theta, pick(params), pick(grads[0]), pick(grads[1]), totals[i]
            )
            assert_same(pick(together[0]), alone[0], rtol=1e-9, atol=1e-12)
            for k, state in alone[1].items():
                roots = {slot for slot in state if slot.startswith("root")}  # whose power magnifies rounding
                for slots, rtol, atol in ((state.keys() - roots, 1e-9, 1e-11), (roots, 1e-7, 1e-9)):
                    ours, theirs = pick(together[1][k]), state
                    assert_same({s: ours[s] for s in slots}, {s: theirs[s] for s in slots}, rtol=rtol, atol=atol)


@every_model
@pytest.mark.parametrize("zeros", [False, True])
def test_the_derivative_of_an_unroll_is_that_of_finite_differences(kind, zeros):
    """Through three steps, gradients taken anew in each, also from zero biases and one layer at zero."""
    torch.manual_seed(0)
    model = MODELS[kind]().double()
    symmetry = infer(model)
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    if zeros:
        layer = [n for n, p in params.items() if p.ndim > 1][-1]
        params = {
            n: p * (p.ndim > 1 and n != layer) if ".ln" not in n and n[:2] != "ln" else p for n, p in params.items()
        }
        params |= {n: torch.ones_like(p) for n, p in params.items() if kind == "cnn" and n == "1.weight"}
    rule = at_random(NFN(), size=0.2)
    theta, direction = theta_of(rule), noise_like(theta_of(rule), 4)
    g = torch.Generator().manual_seed(0)
    if kind == "transformer":
        x = torch.randint(0, 5, (4, 3), generator=g)
    else:
        x = torch.randn(8, *((2, 4, 4) if kind == "cnn" else (4,)), generator=g, dtype=torch.float64)

    def loss(params):
        return functional_call(model, params, (x,)).square().add(0.1).log().mean() + sum(
            (functional_call(model, params, (x,)) - 1).square().mean() for _ in range(1)
        )

    def unrolled(theta):
        w, state = params, rule.init(params)
        for _ in range(3):
            update, state = functional_call(rule, theta, (w, grad(loss)(w), state, symmetry), {"total_steps": 6})
            w = {n: p + update[n] for n, p in w.items()}
        return loss(w)

    ours = grad(unrolled)(theta)
    assert all(d.isfinite().all() for d in ours.values())
    assert any(d.any() for d in ours.values())
    eps = 1e-7
    with torch.no_grad():
        ends = [unrolled({n: t + s * eps * direction[n] for n, t in theta.items()}) for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * eps)
    along = sum((ours[n] * direction[n]).sum() for n in theta)
    assert abs(slope) > 1e-5
    torch.testing.assert_close(along, slope, rtol=1e-4, atol=1e-9)


# ------------------------------------------------------------------------------- its arithmetic
@every_model
def test_fast_gates_equal_vectors_per_entry(kind):
    """One hidden layer on ``[e, h_row, h_col, layer]`` of every entry, materialised."""
    symmetry, params, grads, state = make(kind)
    rule = at_random(NFN())
    layout, frames = rule._laid_out(params, grads, symmetry)
    seen, state = rule._seen(layout, frames, grads, state, 0.9)
    views = rule._views(layout, frames, params, seen, state, 0.9)
    units = torch.randn(layout.n_units + 1, rule.width, dtype=torch.float64)
    units[-1] = 0
    for view in views:
        n, r, c = view.stack.shape
        x = features.odd_features(view.g, view.nesterov, view.slow, view.w, view.adam)
        e = features.even_features(x, view.adam)
        layer = torch.randn(n, rule.width, dtype=torch.float64)
        rows, cols = broadcast(units, view.stack.rows), broadcast(units, view.stack.cols)
        entries = torch.cat(
            [
                e.permute(1, 2, 3, 0),
                rows.permute(1, 2, 0)[:, :, None].expand(n, r, c, -1),
                cols.permute(1, 2, 0)[:, None].expand(n, r, c, -1),
                layer[:, None, None].expand(n, r, c, -1),
            ],
            -1,
        )
        maps = [rule.entry.weight, rule.row.weight, rule.col.weight, rule.layer.weight]
        hidden = torch.relu(linear(entries, torch.cat(maps, 1), rule.entry.bias))
        expected = linear(hidden, rule.gate.weight, rule.gate.bias).permute(3, 0, 1, 2)
        assert expected.shape == (N_ODD, n, r, c)
        assert_same(rule._gates(e.clone(), rows, cols, layer), expected)


@every_model
@pytest.mark.parametrize("rule", ["nfn", "nfn-permutation", "nfn-parameter", "nominal"])
def test_the_update_is_odd(kind, rule):
    symmetry, params, grads, state = make(kind)
    rule = at_random(RULES[rule]())
    mirror = {n: {k: -x if k in ("m", "m_slow") else x for k, x in s.items()} for n, s in state.items()}
    minus = lambda tensors: {n: -x for n, x in tensors.items()}  # noqa: E731
    with torch.no_grad():
        here, _ = rule(params, grads, state, symmetry, weight_decay=0.1)
        there, _ = rule(minus(params), minus(grads), mirror, symmetry, weight_decay=0.1)
    assert_same(there, minus(here), rtol=1e-12)


@every_model
def test_multiplying_the_loss_changes_nothing(kind):
    symmetry, params, grads, state = make(kind)
    powers = {"m": 1, "m_slow": 1, "v": 2, "moment0": 2, "moment1": 2, "moment2": 2, "moment3": 2}
    louder = {n: {k: 1000.0 ** powers.get(k, 0) * x for k, x in s.items()} for n, s in state.items()}
    rule = at_random(NFN())
    with torch.no_grad():
        here, _ = rule(params, grads, state, symmetry)
        there, _ = rule(params, {n: 1000.0 * g for n, g in grads.items()}, louder, symmetry)
    assert_same(there, here, rtol=1e-8, atol=1e-11)


def test_a_layers_own_gain_sets_the_size_of_its_step():
    """Gates and unit gains change the direction, at the nominal size."""
    symmetry, params, grads, state = make("tanh")
    rule = at_random(NFN())
    with torch.no_grad():
        rule.layer_gain.weight.zero_()
        rule.layer_gain.bias.zero_()
        rule.blend.weight.zero_()
        rule.blend.bias.zero_()
        ours, _ = rule(params, grads, state, symmetry)
        nominal, _ = Nominal()(params, grads, state, symmetry)
        for n in params:
            assert_same(ours[n].norm(), nominal[n].norm())
            assert torch.nn.functional.cosine_similarity(ours[n].ravel(), nominal[n].ravel(), 0) < 0.999
        rule.layer_gain.bias.fill_(math.atanh(0.5))
        louder, _ = rule(params, grads, state, symmetry)
    assert_same(louder, {n: math.e * u for n, u in ours.items()})


# ------------------------------------------------------------------------------------- coupling
@every_model
@pytest.mark.parametrize("pool", [True, False])
def test_no_unit_has_no_embedding(kind, pool):
    """Inputs and outputs are no units: what stands in for them adds nothing to rows and columns that have none."""
    symmetry, params, grads, state = make(kind)
    rule, seen = at_random(NFN(pool=pool)), []
    rule.embedding.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output[0])))
    with torch.no_grad():
        rule(params, grads, state, symmetry)
    ((layout, units),) = seen
    assert units.shape == (layout.n_units + 1, rule.width)
    assert not units[-1].any() and bool(units[:-1].all()) == pool
    outside = [~(s.cols.index < layout.n_units).any(-1) for s in layout.stacks]
    assert any(where.any() for where in outside)
    for stack, where in zip(layout.stacks, outside, strict=True):
        assert not broadcast(units, stack.cols)[:, where].any()


@pytest.mark.parametrize("kind, first", [("mlp", "0.weight"), ("cnn", "0.weight"), ("transformer", "embed.weight")])
def test_pooling_couples_the_network_and_nothing_else_does(kind, first):
    symmetry, params, grads, state = make(kind)
    other = {**grads, first: torch.randn_like(grads[first])}

    def moved(rule):
        rule = at_random(RULES[rule]())
        with torch.no_grad():
            return differs(*(rule(params, g, state, symmetry)[0] for g in (grads, other)))

    assert moved("nfn") == set(params)
    assert moved("nfn-permutation") == set(params)
    assert moved("nfn-parameter") == {first}
    assert moved("nominal") == {first}


def test_units_carry_what_the_network_cannot():
    """Without the network's and the layers' own means a gradient speaks to its neighbours alone."""
    symmetry, params, grads, state = make("tanh")
    rule = at_random(NFN())
    with torch.no_grad():
        rule.embedding.network.weight.zero_()
        other = {**grads, "0.bias": torch.randn_like(grads["0.bias"])}
        updates = [rule(params, g, state, symmetry)[0] for g in (grads, other)]
    assert differs(*updates) == {"0.weight", "0.bias", "2.weight"}


def test_a_weight_that_is_not_trained_is_context_for_the_frame():
    symmetry, params, grads, state = make("mlp")
    rule = at_random(NFN())
    some = {n: g for n, g in grads.items() if n != "2.weight"}
    with torch.no_grad():
        here, after = rule(params, some, state, symmetry)
        there, _ = rule({**params, "2.weight": 3 * params["2.weight"]}, some, state, symmetry)
    assert here.keys() == some.keys()
    assert_same(after["2.weight"], state["2.weight"] | {"clock": state["2.weight"]["clock"] + 1}, rtol=0, atol=0)
    assert differs(here, there) == set(some)


# ----------------------------------------------------------------------------------- written out
def written_out(w, seen, seen_b, step, roots, to_come):
    """The directions of one matrix and its bias without frame, as the equations of nominal.py read.

    ``seen``: gradient, m and v before it, of the matrix; ``seen_b`` of the bias. ``roots``: by axis, of those that are
    whitened. ``to_come``: the length of the run.
    """

    def averages(g, m, v):
        m, v = 0.9 * m + 0.1 * g, (0.99 * v + 0.01 * g * g) / (1 - 0.99**step)
        return 0.9 * m + 0.1 * g, m / (1 - 0.9**step) / v.sqrt(), v

    (x, adam, v), (y, adam_b, v_b) = averages(*seen), averages(*seen_b)
    size = w.square().mean().sqrt()
    small = min(1, max(0.1, float(size) * w.shape[1] ** 0.5 / 0.5))
    if min(w.shape) <= 4:  # in its first steps, of which the fourth is one
        whitened = roots[0] @ x
        return small * whitened * adam.norm() / whitened.norm(), 2 * adam_b
    if len(roots) < 2:
        x, y = x / v**0.25, y / v_b**0.25
    left, right = (roots.get(i, torch.eye(n, dtype=x.dtype)) for i, n in enumerate(x.shape))
    x = torch.cat([left @ x @ right, 3 * left @ y[:, None]], 1)
    u, s, vt = torch.linalg.svd(x / x.norm(), full_matrices=False)
    for _ in range(4):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    polar, column = ((u * s) @ vt).split([w.shape[1], 1], 1)
    out = left @ polar @ right
    pace = small * 0.2 * (512 / w.shape[1]) ** 0.25 * max(w.shape) ** 0.5 * polar.norm() / out.norm()
    heard = min(1.0, float(adam_b.square().mean().sqrt()) / 0.2)
    shrink = 0.025 * min(4.0, (800 / to_come) ** 0.5) * (512 / w.shape[1]) ** 0.25
    toward_zero = shrink * w * (pace * out).square().mean().sqrt() / size
    return pace * out + toward_zero, 3 * heard * pace * (left @ column)[:, 0]


@pytest.mark.parametrize("size", [0.03, 0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    "total, rate",
    [
        (None, 0.01 / math.sqrt(1 + 3 / 100)),
        (20, 0.04 * (1 - 3 / 20)),
        (3200, 0.005 * (1 - 3 / 3200)),
    ],
)
def test_the_nominal_step_is_its_equations(total, rate, size):
    """Also for weights smaller than usual, down to where they count as zero."""
    symmetry, params, grads, state = make("tanh")
    params = {n: size * p for n, p in params.items()}
    updates, _ = Nominal(frame=False)(params, grads, state, symmetry, total_steps=total)
    seen = {n: (grads[n], state[n]["m"], state[n]["v"]) for n in params}
    for layer in ("0", "2", "4"):
        w, b = f"{layer}.weight", f"{layer}.bias"
        hidden = {"0": (0,), "2": (0, 1), "4": (1,)}[layer]  # the network's inputs and outputs are not whitened
        roots = {i: state[w][f"root{i}"] for i in hidden}
        expected = written_out(params[w], seen[w], seen[b], 4, roots, total or 504)
        for name, direction in zip((w, b), expected, strict=True):
            assert_same(updates[name], -rate * direction, rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------- schedule
def sizes(rule, steps, total):
    """Norm of the update of one tensor at each step, gradients always the same."""
    symmetry, params, grads, state = make("tanh", steps=0)
    out = []
    with torch.no_grad():
        for _ in range(steps):
            updates, state = rule(params, grads, state, symmetry, total_steps=total)
            assert all(u.isfinite().all() for u in updates.values())
            out.append(updates["2.weight"].norm().item())
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("rule", [Nominal(), DecayingPolar()])
def test_the_rate_decays_to_zero_at_the_horizon(rule):
    size = sizes(rule, 14, 10)
    t = torch.arange(14, dtype=torch.float64).clamp(max=10) / 10
    expected = 1 - t if type(rule) is Nominal else 0.5 * (1 + torch.cos(torch.pi * t))
    assert_same(size / size[0], expected, rtol=1e-9, atol=1e-9)
    assert size[9] < 0.11 * size[0] and size[10:].max() < 1e-12


def test_without_horizon_the_rate_decays_without_end():
    size = sizes(Nominal(), 6, None)
    assert (size[1:] < size[:-1]).all()
    t = torch.tensor([1.0, 101.0, 901.0, 1e6])
    rate = schedule(t, None)
    torch.testing.assert_close(rate[:2], torch.tensor([1.0, 0.5**0.5]))
    assert (rate[1:] < rate[:-1]).all() and rate[-1] > 0


@pytest.mark.parametrize("total", [None, 1, 3, 3.5, torch.tensor(3.0, dtype=torch.float64)])
def test_the_learned_rule_is_finite_at_and_past_the_horizon(total):
    size = sizes(at_random(NFN()), 6, total)
    if total is None:
        assert (size > 0).all()
    else:
        assert size[0] > 0 and size[4:].max() < 1e-12 * size[0] + 1e-15


def test_time_features_are_of_one_size():
    for t in (1.0, 10.0, 1e4):
        for total in (None, 1, 1000, 10**5):
            x = time_features(torch.tensor(t), total)
            assert x.shape == (N_TIME,) and x.isfinite().all() and x.abs().max() <= 1.25
    done = time_features(torch.tensor(6.0), 10)
    torch.testing.assert_close(done[3:], torch.tensor([0.5, 0.5]))
    half_way = time_features(torch.tensor(6.0), 12.0)
    torch.testing.assert_close(time_features(torch.tensor(6.0), None), half_way)


@pytest.mark.parametrize("name", ["nominal", "nfn"])
def test_the_clock_is_the_networks_not_the_tensors(name):
    symmetry, params, grads, state = make("tanh", steps=0)
    rule = at_random(RULES[name]())
    for n in params:
        if n != "2.weight":
            state[n] |= {k: state[n][k] + 49 for k in ("step", "clock")}
    fresh = {n: s | {k: torch.zeros_like(s[k]) for k in ("step", "clock")} for n, s in state.items()}
    with torch.no_grad():
        late, after = rule(params, grads, state, symmetry, total_steps=100)
        early, _ = rule(params, grads, fresh, symmetry, total_steps=100)
    assert after["2.weight"]["step"] == 1 and after["0.weight"]["step"] == 50
    assert all(s["clock"] == 50 for s in after.values())
    ratio = late["2.weight"].norm() / early["2.weight"].norm()
    expected = 1 - 0.49
    if name == "nominal":
        assert_same(ratio.item(), expected)
    else:
        assert ratio < 0.9
