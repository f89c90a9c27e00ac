"""The learned rule: where it starts, what its controls see and move with, when they are set, how they are learned."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from learned_opt import NFNOpt
from learned_opt.batch_layout import batches_of
from learned_opt.blocks import unit_tables
from learned_opt.functional import functional
from learned_opt.rules import RULES
from learned_opt.rules.clock import EVERY_FRAME
from learned_opt.rules.learned import CONTROLS, FEATURES, LAST, Learned
from tasks.conv import cnn
from tasks.mlp import mlp
from tasks.transformer import Transformer
from tests.inferred import infer

MODELS = {
    "relu": lambda: mlp([4, 7, 6, 5], "relu"),
    "tanh": lambda: mlp([4, 7, 6, 5], "tanh"),  # the first layer is thin
    "cnn": lambda: cnn((2, 4, 4), (6, 5), 5, "relu", norm=True),
    "transformer": lambda: Transformer(
        nn.Embedding(5, 6), 3, 5, width=6, heads=2, depth=1, hidden=7, causal=True, fused=True
    ),
}
every_model = pytest.mark.parametrize("kind", MODELS)
STEPS = 2 * EVERY_FRAME + 3  # two times the controls are held, and set anew


def make_model(kind, dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[kind]().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def at_random(size=0.3, **options):
    """The rule with learned weights away from their start."""
    rule, generator = Learned(**options), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return rule.double()


def weights_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def noise_like(tensors, seed):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) for n, p in tensors.items()}


def loss_of(model, kind):
    """A function of weights and of the step, whose batch it takes."""

    def loss(params, step):
        g = torch.Generator().manual_seed(step)
        if kind == "transformer":
            x = torch.randint(0, 5, (6, 3), generator=g)
            y = (x + x.roll(1, -1)).flatten() % 5
        else:
            x = torch.randn(8, *((2, 4, 4) if kind == "cnn" else (4,)), generator=g, dtype=torch.float64)
            y = x.flatten(1)[:, :5].argmax(-1)
        return nn.functional.cross_entropy(functional_call(model, params, (x,)).flatten(0, -2), y)

    return loss


def trained(rule, params, loss, symmetry, steps=STEPS, total_steps=None):
    init, update = functional(rule, symmetry, total_steps=total_steps)
    state = init(params)
    with torch.no_grad():
        for step in range(steps):
            params, state = update(params, grad(loss)(params, step), state)
    return params, state


def assert_same(a, b, rtol=1e-7, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------ the start
@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("total_steps", [None, 50])
def test_with_last_maps_at_zero_it_is_the_hand_made_rule_bit_for_bit(kind, dtype, total_steps):
    rule, generator = Learned(), torch.Generator().manual_seed(1)
    with torch.no_grad():  # whatever the hidden maps are
        for n, p in rule.named_parameters():
            if n.split(".")[0] not in LAST:
                p.add_(torch.randn(p.shape, generator=generator))
    ends = []
    for r in (rule, RULES["auto_lr"]()):
        model = make_model(kind, dtype)
        optimizer = NFNOpt(model.named_parameters(), symmetry=infer(model), rule=r, total_steps=total_steps)
        for step in range(STEPS):
            for p, g in zip(model.parameters(), noise_like(weights_of(model), step).values(), strict=True):
                p.grad = g
            optimizer.step()
        ends.append(weights_of(model))
    assert_same(*ends, rtol=0, atol=0)


def test_fresh_learned_weights_are_the_hand_made_rule_and_the_same_every_time():
    first, second = Learned(), Learned()
    assert_same(dict(first.named_parameters()), dict(second.named_parameters()), rtol=0, atol=0)
    model = make_model("relu")
    params, symmetry, loss = weights_of(model), infer(model), loss_of(model, "relu")
    ours, theirs = (trained(r, params, loss, symmetry)[0] for r in (first, RULES["auto_lr"]()))
    assert_same(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("pool", [True, False])
def test_one_set_of_learned_weights_serves_every_network(pool):
    rule = at_random(pool=pool)
    for kind in MODELS:
        model = make_model(kind)
        params = weights_of(model)
        end, _ = trained(rule, params, loss_of(model, kind), infer(model))
        hand_made, _ = trained(RULES["auto_lr"](), params, loss_of(model, kind), infer(model))
        assert all(x.isfinite().all() for x in end.values())
        assert not any(torch.allclose(end[n], hand_made[n], rtol=1e-3) for n in end if params[n].ndim > 1)


# ---------------------------------------------------------------------------------------- equivariance
@every_model
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("total_steps", [None, STEPS + 5])
def test_a_moved_network_follows_and_so_do_its_units_controls(kind, pool, total_steps):
    model = make_model(kind)
    params, symmetry, loss = weights_of(model), infer(model), loss_of(model, kind)
    g = symmetry.sample(torch.Generator().manual_seed(2), scale_range=(1e-2, 1e2))
    rule = at_random(pool=pool)
    here, state = trained(rule, params, loss, symmetry, total_steps=total_steps)
    there, moved = trained(rule, symmetry.act(g, params), loss, symmetry, total_steps=total_steps)
    for n, x in symmetry.act(symmetry.invert(g), there).items():
        assert torch.linalg.vector_norm(x - here[n]) <= 1e-7 * torch.linalg.vector_norm(here[n])
    assert_same(
        {k: moved["tensor"][f"log_{k}"] for k in CONTROLS},
        {k: state["tensor"][f"log_{k}"] for k in CONTROLS},
    )
    own, other = (s["network"]["log_unit_gain"] for s in (state, moved))
    if not pool:
        assert not own.any()
        return
    tables, _ = unit_tables(symmetry, "label")
    permuted = 0
    for name, label in symmetry.labels.items():
        if label.fixed:
            continue
        index = g.perms[name]
        before = own[tables[name]]
        if label.over:  # heads first, then the units of each
            (base,) = label.over
            before = before.index_select(0, g.perms[base])
            expected = before.gather(1, index[..., None].expand(before.shape))
        else:
            expected = before.index_select(0, index)
        assert_same(other[tables[name]], expected)
        permuted += not torch.allclose(other[tables[name]], own[tables[name]], rtol=1e-3)
    assert permuted


def moved_apart(kind, rule, pairs):
    """How far an update is from equivariant where some axes are permuted by themselves; random gradients."""
    model = make_model(kind)
    params, symmetry = weights_of(model), infer(model)
    perms = {
        pair: torch.randperm(params[pair[0]].shape[pair[1]], generator=torch.Generator().manual_seed(1))
        for pair in pairs
    }

    def act(tensors):
        found = dict(tensors)
        for (name, axis), perm in perms.items():
            found[name] = found[name].index_select(axis, perm)
        return found

    init, update = functional(rule, symmetry)
    ends = []
    for move in (lambda x: x, act):
        w, state = move(params), init(params)
        with torch.no_grad():
            for step in range(4):
                w, state = update(w, move(noise_like(params, step)), state)
        ends.append(w)
    return max(float((x - y).abs().max()) for x, y in zip(act(ends[0]).values(), ends[1].values(), strict=True))


def test_units_pair_what_writes_them_with_what_reads_them():
    writers, reader = [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)]
    assert moved_apart("tanh", at_random(), writers + reader) < 1e-9
    assert moved_apart("tanh", at_random(), writers) > 1e-4
    assert moved_apart("tanh", at_random(), reader) > 1e-4
    for rule in (at_random(pool=False), RULES["auto_lr"]()):
        assert moved_apart("tanh", rule, writers) < 1e-9


@every_model
def test_the_unit_of_the_loss_changes_nothing(kind):
    model = make_model(kind)
    params, symmetry, loss = weights_of(model), infer(model), loss_of(model, kind)
    here, _ = trained(at_random(), params, loss, symmetry, steps=5)
    there, _ = trained(at_random(), params, lambda w, step: 1e6 * loss(w, step), symmetry, steps=5)
    assert_same(there, here, rtol=1e-5, atol=1e-6)


def test_without_the_pool_a_gradient_speaks_to_its_own_tensor_alone():
    model = make_model("tanh")
    params, symmetry = weights_of(model), infer(model)
    grads = noise_like(params, 0)
    other = {**grads, "0.weight": noise_like(params, 1)["0.weight"]}

    def controls(rule, g):
        _, state = rule(params, g, rule.init(params, symmetry), symmetry)
        return state["tensor"]["log_gain"]

    with torch.no_grad():
        alone, pooled = (
            (controls(rule, grads) - controls(rule, other)).abs() > 1e-9
            for rule in (at_random(pool=False), at_random())
        )
    assert alone.sum() == 1 and pooled.all()


def told(control, value):
    """A rule that tells every matrix one thing."""
    rule = Learned().double().requires_grad_(False)
    with torch.no_grad():
        if control == "momentum":
            rule.network_controls.bias.fill_(value)
        else:
            rule.tensor_controls.weight[list(CONTROLS).index(control), 0] = value
    return rule


def test_controls_do_what_their_names_say():
    model = make_model("relu")
    params, symmetry = weights_of(model), infer(model)
    grads = noise_like(params, 0)

    def first(rule, weight_decay=0.0):
        return rule(params, grads, rule.init(params, symmetry), symmetry, weight_decay=weight_decay)

    plain, _ = first(Learned().double())
    gain, _ = first(told("gain", 0.5))
    torch.testing.assert_close(gain["2.weight"], math.exp(math.tanh(0.5)) * plain["2.weight"])
    bias, _ = first(told("bias", 0.5))
    torch.testing.assert_close(bias["2.bias"], math.exp(math.tanh(0.5)) * plain["2.bias"])
    torch.testing.assert_close(bias["2.weight"], plain["2.weight"])
    decayed = [
        first(rule, None)[0]["2.weight"] - plain["2.weight"] for rule in (Learned().double(), told("decay", 0.5))
    ]
    torch.testing.assert_close(decayed[1], math.exp(2 * math.tanh(0.5)) * decayed[0])
    network = {"log_momentum": torch.tensor(0.5), "clock": torch.tensor(60.0)}
    assert float(Learned().momentum(torch.tensor(0.9), network)) == pytest.approx(1 - 0.1 * math.exp(0.5))
    network["clock"] = torch.tensor(40.0)  # in the warm-up
    assert float(Learned().momentum(torch.tensor(0.9), network)) == pytest.approx(0.9)


@every_model
def test_where_nothing_is_read_off_the_network_it_is_not_asked(kind, monkeypatch):
    model = make_model(kind)
    params, symmetry, loss = weights_of(model), infer(model), loss_of(model, kind)
    rule = at_random()
    with torch.no_grad():
        for p in (rule.tensor_controls.weight[:, len(FEATURES) :], *rule.unit_controls.parameters()):
            p.zero_()
        asked = copy.deepcopy(rule)
        asked.unit_controls.bias.fill_(1e-300)
    expected, _ = trained(asked, params, loss, symmetry, total_steps=40)
    monkeypatch.setattr(Learned, "_embedded", None)
    found, _ = trained(rule, params, loss, symmetry, total_steps=40)
    assert_same(found, expected)


@pytest.mark.parametrize("age", [3, 20, 200])
def test_gradients_agree_where_they_are_the_same_and_not_where_they_are_independent(age):
    model = make_model("relu")
    params, symmetry = weights_of(model), infer(model)
    rule = Learned().double().requires_grad_(False)
    layout = batches_of(symmetry, tuple(params), torch.device("cpu"))
    column = FEATURES.index("agreement of gradients")
    found = {}
    for kind in ("same", "independent"):
        each = []
        for seed in range(8):
            state = rule.init(params, symmetry)
            for step in range(age):
                g = noise_like(params, 1000 * seed + (step if kind == "independent" else 0))
                _, state = rule(params, g, state, symmetry)
            with torch.no_grad():
                each.append(rule.known(layout, state, None)[:, column])
        found[kind] = torch.stack(each).mean(0)
    assert (found["same"] > 0.9).all()
    assert (found["independent"].abs() < 0.35).all()


# -------------------------------------------------------------------------------------- the slow clock
def test_controls_hold_between_two_frames():
    model = make_model("relu")
    params, symmetry = weights_of(model), infer(model)
    rule, seen = at_random(), []
    init, update = functional(rule, symmetry)
    state = init(params)
    with torch.no_grad():
        for step in range(STEPS):
            params, state = update(params, noise_like(params, step), state)
            seen.append((state["tensor"]["log_gain"].clone(), state["network"]["log_unit_gain"].clone()))
    changed = [k + 1 for k in range(1, STEPS) if not torch.equal(seen[k][0], seen[k - 1][0])]
    assert changed == [2, 3, 10, 20]
    assert changed == [k + 1 for k in range(1, STEPS) if not torch.equal(seen[k][1], seen[k - 1][1])]


@pytest.mark.parametrize("kind", ["relu", "transformer"])
def test_vmap_over_runs_of_other_ages_is_a_loop(kind):
    model = make_model(kind)
    symmetry, rule = infer(model), at_random()
    starts, loss = [weights_of(model), {n: 1.1 * p for n, p in weights_of(model).items()}], loss_of(model, kind)
    runs = [trained(rule, w, loss, symmetry, steps) for w, steps in zip(starts, (8, 3), strict=True)]

    def stack(trees):
        first = trees[0]
        return {
            k: stack([t[k] for t in trees]) if isinstance(x, dict) else torch.stack([t[k] for t in trees])
            for k, x in first.items()
        }

    params, state = stack([r[0] for r in runs]), stack([r[1] for r in runs])
    _, update = functional(rule, symmetry)
    alone = list(runs)
    with torch.no_grad():
        for step in range(4):
            grads = [noise_like(starts[0], 10 * step + i) for i in range(2)]
            params, state = vmap(update)(params, stack(grads), state)
            alone = [update(w, g, s) for (w, s), g in zip(alone, grads, strict=True)]
    for i, (w, s) in enumerate(alone):
        assert_same({n: x[i] for n, x in params.items()}, w)
        assert_same(state["network"]["log_unit_gain"][i], s["network"]["log_unit_gain"])
        assert_same(state["tensor"]["log_fresh"][i], s["tensor"]["log_fresh"])


# -------------------------------------------------------------------------------------------- learning
@pytest.mark.parametrize("kind", ["relu", "cnn", "transformer"])
def test_the_derivative_of_twelve_steps_is_that_of_finite_differences(kind):
    model = make_model(kind)
    params, symmetry, loss, rule = weights_of(model), infer(model), loss_of(model, kind), at_random(size=0.2)
    learned = {n: p.detach().clone() for n, p in rule.named_parameters()}
    init, update = functional(rule, symmetry, total_steps=14)

    def unrolled(learned):
        w, state = params, init(params)
        for step in range(12):
            w, state = update(w, grad(loss)(w, step), state, weights=learned)
        return loss(w, 99)

    ours = grad(unrolled)(learned)
    assert all(d.isfinite().all() for d in ours.values())
    assert all(d.any() for n, d in ours.items() if not n.startswith("network_controls"))  # after the warm-up
    for names in (set(learned), {"tensor_controls.weight"}, {"unit_controls.weight"}, {"embedding.unit.weight"}):
        direction = {n: z if n in names else 0 * z for n, z in noise_like(learned, 4).items()}
        with torch.no_grad():
            up, down = (unrolled({n: x + s * 1e-6 * direction[n] for n, x in learned.items()}) for s in (1, -1))
        along = sum((ours[n] * direction[n]).sum() for n in learned)
        torch.testing.assert_close(along, (up - down) / 2e-6, rtol=1e-3, atol=1e-7)


# ----------------------------------------------------------------------------------- saving, sitting out
def test_a_run_resumes_bit_for_bit_between_two_frames():
    def make(seed):
        model = make_model("transformer", torch.float32)
        return model, NFNOpt(model.named_parameters(), symmetry=infer(model), rule=at_random().float(), total_steps=30)

    def steps(model, optimizer, some):
        for step in some:
            for p, g in zip(model.parameters(), noise_like(weights_of(model), step).values(), strict=True):
                p.grad = g
            optimizer.step()

    (model, optimizer), (other, resumed) = make(0), make(0)
    steps(model, optimizer, range(6))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, range(6, 13))
    steps(other, resumed, range(6, 13))
    assert_same(weights_of(other), weights_of(model), rtol=0, atol=0)


def test_tensors_without_a_gradient_keep_their_controls():
    model = make_model("tanh")
    params, symmetry, rule = weights_of(model), infer(model), at_random()
    grads = noise_like(params, 0)
    with torch.no_grad():
        _, state = rule(params, grads, rule.init(params, symmetry), symmetry)
        some = {n: 2 * g for n, g in noise_like(params, 1).items() if not n.startswith("2.")}
        updates, after = rule(params, some, state, symmetry)
    assert updates.keys() == some.keys()
    same = (after["tensor"]["log_gain"] == state["tensor"]["log_gain"]).sum()
    assert same == 1
