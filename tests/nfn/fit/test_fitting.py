"""Fitting on weights: what is learned, what stays invariant, and errors that say what to do."""

import math
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from sklearn.metrics import r2_score
from torch import nn

from learned_opt import SymmetryError
from learned_opt.nfn import (
    Chain,
    Fit,
    TransformerNFN,
    WeightSpaceEditor,
    WeightSpacePredictor,
    kendall_tau,
    network_outputs,
    r2,
)
from learned_opt.nfn.fit.training import _from_plain, _to_plain
from learned_opt.nfn.fit.weight_spaces import join_data, map_data, stacked
from learned_opt.nfn.transformer_space import zoo_spec
from tests.inferred import infer
from tests.nfn.chains import act, error, mlp
from tests.nfn.test_general import residual
from tests.nfn.test_transformer_nfn import ZooNet

WIDTHS = [3, 6, 5, 2]


def networks(count=60, seed=0, dtype=torch.float32):
    """MLPs with random weights, stacked, and a target in (0, 1) that depends on the function alone."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: p.shape for n, p in mlp(WIDTHS).named_parameters()}
    table = {n: torch.randn(count, *s, generator=generator, dtype=dtype) / 2 for n, s in shapes.items()}
    x = torch.randn(20, WIDTHS[0], generator=generator, dtype=dtype)
    return table, network_outputs(mlp(WIDTHS), x)(table).mean(1)[:, 0].mul(2).sigmoid()


def chain(scale="positive"):
    return Chain.from_state_dict(mlp(WIDTHS).state_dict(), scale=scale)


def small(kind="monomial", space=None, **options):
    sizes = {} if kind in ("stat", "mlp", "general") else {"channels": (4, 4)}
    return WeightSpacePredictor(space or chain(), kind=kind, head_width=16, **sizes, **options)


FAST = Fit(epochs=3, batch=16, lr=3e-3, checkpoint_seconds=0)


def weights_of(fitted):
    return {n: x.clone() for n, x in fitted.module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------------------- what is learned
@pytest.mark.parametrize("kind", ["hnp", "monomial", "magep"])
def test_predictor_ranks_networks_that_it_has_not_seen(kind):
    table, targets = networks(300)
    held = {n: x[200:] for n, x in table.items()}
    settings = Fit(epochs=12, batch=32, lr=2e-2, evaluate_every=4)
    predictor = small(kind).fit({n: x[:200] for n, x in table.items()}, targets[:200], settings=settings)
    found = predictor.score(held, targets[200:])
    assert found["tau"] > 0.35
    assert found["tau"] == pytest.approx(kendall_tau(predictor.predict(held), targets[200:]))
    assert found["mse"] == pytest.approx(float((predictor.predict(held) - targets[200:]).square().mean()), rel=1e-5)
    assert ((predictor.predict(held) >= 0) & (predictor.predict(held) <= 1)).all()
    assert len(predictor.history) == 12 and predictor.history[-1]["train_loss"] < predictor.history[0]["train_loss"]


def test_classes_are_learned_from_state_dicts_and_from_modules():
    table, targets = networks(100)
    states = [{n: x[i] for n, x in table.items()} for i in range(100)]
    models = []
    for state in states:
        models.append(mlp(WIDTHS))
        models[-1].load_state_dict(state)
    labels = (targets > targets.median()).long()
    fits = [
        small("hnp", outputs=2, loss="cross_entropy").fit(x, labels, settings=Fit(epochs=8, batch=32, lr=2e-2))
        for x in (states, models, table)
    ]
    assert same(weights_of(fits[0]), weights_of(fits[1])) and same(weights_of(fits[0]), weights_of(fits[2]))
    assert fits[0].score(states, labels)["accuracy"] > 0.7
    assert fits[0].predict(states).dtype == torch.int64
    assert fits[0].score(states, labels)["accuracy"] == float((fits[0].predict(states) == labels).float().mean())


def test_several_numbers_and_a_loss_of_ones_own():
    table, targets = networks(40)
    both = torch.stack([targets, 3 - 5 * targets], 1)
    predictor = small("hnp", outputs=2, loss="mse").fit(table, both, settings=FAST)
    assert predictor.predict(table).shape == (40, 2)
    assert {"tau", "r2", "mse", "loss"} <= predictor.history[-1].keys()

    def absolute(outputs, wanted):
        return (outputs[:, 0] - wanted).abs().mean()

    own = small("hnp", loss=absolute).fit(table, targets, settings=FAST)
    assert own.score(table, targets)["loss"] == pytest.approx(float(absolute(own.outputs_of(table), targets)))
    assert own.score(table, targets).keys() == {"loss"}


def test_the_best_weights_by_validation_are_kept():
    table, targets = networks(40)
    fit = Fit(epochs=5, batch=16, lr=0.3, schedule="constant")
    predictor = small("hnp").fit(table, targets, settings=fit, validation=(table, targets))
    taus = [row["tau"] for row in predictor.history]
    assert max(taus) > taus[-1]  # otherwise this shows nothing
    assert predictor.score(table, targets)["tau"] == pytest.approx(max(taus))
    last = small("hnp").fit(table, targets, settings=fit, validation=None)
    assert last.score(table, targets)["tau"] == pytest.approx(taus[-1])


def test_seeds_decide_and_the_global_generator_is_left_alone(monkeypatch):
    table, targets = networks(50)

    space = chain()

    def fit(seed, order=0):
        predictor = small("hnp", space, seed=seed, dropout=0.5)
        return predictor.fit(table, targets, settings=Fit(epochs=2, batch=16, seed=order))

    before = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.delattr(torch.cuda, "manual_seed_all")  # nor are those of GPUs seeded
        fit(0)
    one = weights_of(fit(0))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert same(one, weights_of(fit(0)))
    assert not same(one, weights_of(fit(1))) and not same(one, weights_of(fit(0, order=1)))


# ------------------------------------------------------------------------------------------- symmetry
def moved(table, symmetry, seed=1):
    g = symmetry.sample(torch.Generator().manual_seed(seed))
    return {n: x[:, 0] for n, x in act(symmetry, g, {n: x.unsqueeze(1) for n, x in table.items()}).items()}


@pytest.mark.parametrize(("standardise", "norm"), [(False, False), (True, True)])
@pytest.mark.parametrize(("kind", "invariant"), [("monomial", True), ("magep", True), ("hnp", False)])
def test_a_fitted_predictor_is_invariant_in_float64(kind, invariant, standardise, norm):
    table, targets = networks(61, dtype=torch.float64)  # 49 train: the last minibatch would be a single network
    predictor = small(kind, standardise=standardise, norm=norm)
    predictor.module.double()
    predictor.fit(table, targets, settings=FAST)
    difference = error(predictor.outputs_of(moved(table, infer(mlp(WIDTHS)))), predictor.outputs_of(table))
    assert difference < 1e-10 if invariant else difference > 1e-2


def test_any_symmetry_has_a_predictor_and_an_editor():
    symmetry = residual()
    generator = torch.Generator().manual_seed(0)
    table = {n: torch.randn(20, *s.shape, generator=generator, dtype=torch.float64) for n, s in symmetry.specs.items()}
    targets = torch.rand(20, generator=generator, dtype=torch.float64)
    predictor = WeightSpacePredictor(symmetry, channels=(3, 3), head_width=8)
    predictor.module.double()
    predictor.fit(table, targets, settings=FAST)
    assert error(predictor.outputs_of(moved(table, symmetry)), predictor.outputs_of(table)) < 1e-10
    editor = WeightSpaceEditor(symmetry, loss=lambda w, t: (w["head"].mean((1, 2)) - t).square().mean(), channels=(3,))
    editor.module.double()
    editor.fit(table, targets, settings=FAST)
    assert error(editor.edit_stacked(moved(table, symmetry)), moved(editor.edit_stacked(table), symmetry)) < 1e-10


def test_the_frame_of_a_general_symmetry_takes_scales_out():
    table, targets = networks(40, dtype=torch.float64)
    symmetry = infer(mlp(WIDTHS))
    predictor = WeightSpacePredictor(symmetry, kind="general", channels=(3, 3), head_width=8)
    predictor.module.double()
    predictor.fit(table, targets, settings=FAST)
    assert error(predictor.outputs_of(moved(table, symmetry)), predictor.outputs_of(table)) < 1e-8


def test_an_exact_editor_commutes_with_the_group():
    table, targets = networks(40, dtype=torch.float64)
    render = network_outputs(mlp(WIDTHS), torch.randn(10, WIDTHS[0], dtype=torch.float64))
    editor = WeightSpaceEditor(chain(), loss=lambda w, t: (render(w)[..., 0] - t[:, None]).square().mean(), width=4)
    editor.module.double()
    editor.fit(table, targets, settings=FAST)
    symmetry = infer(mlp(WIDTHS))
    assert error(editor.edit_stacked(moved(table, symmetry)), moved(editor.edit_stacked(table), symmetry)) < 1e-10


def test_standardising_reads_the_training_networks_alone():
    table, targets = networks(60)
    train = {n: x[:40] for n, x in table.items()}

    def moments(scale):
        held = {n: scale * x[40:] for n, x in table.items()}
        fitted = small(standardise=True).fit(train, targets[:40], validation=(held, targets[40:]), settings=FAST)
        return fitted.moments

    assert moments(1.0) == moments(100.0)
    for name, (mean, rms) in moments(1.0).items():
        assert mean == 0.0 and rms == pytest.approx(float(train[name].square().mean().sqrt()), rel=1e-6)
    plain = WeightSpacePredictor(chain(None), kind="hnp", channels=(4,), head_width=8, standardise=True)
    plain.fit(train, targets[:40], validation=None, settings=FAST)
    for name, (mean, rms) in plain.moments.items():
        assert mean == pytest.approx(float(train[name].mean()), abs=1e-6)
        assert rms == pytest.approx(float(train[name].std(correction=0)), rel=1e-5)


@pytest.mark.parametrize("kind", ["stat", "mlp", "hnp"])
def test_what_has_no_parameters_is_computed_once_and_changes_nothing(kind):
    table, targets = networks(30)
    predictor = small(kind).fit(table, targets, settings=FAST)
    whole = predictor.module({n: x.unsqueeze(1) for n, x in table.items()})
    torch.testing.assert_close(predictor.outputs_of(table), whole)


# ------------------------------------------------------------------------------------------- editing
def test_an_editor_does_what_its_loss_asks():
    table, _ = networks(60)
    x = torch.randn(10, WIDTHS[0], generator=torch.Generator().manual_seed(5))
    render = network_outputs(mlp(WIDTHS), x)
    wanted = render(table) + 1.0  # the output bias must grow by one

    def loss(weights, targets):
        return (render(weights) - targets).square().mean()

    editor = WeightSpaceEditor(chain(), loss=loss, width=4, depth=1)
    editor.fit(table, wanted, settings=Fit(epochs=30, batch=16, lr=3e-2))
    assert editor.score(table, wanted)["loss"] < 0.1 < 0.9 < float(loss(table, wanted))
    states = editor.edit([{n: x[i] for n, x in table.items()} for i in range(3)])
    assert [{n: x.shape for n, x in s.items()} for s in states] == [{n: x.shape[1:] for n, x in table.items()}] * 3
    model = mlp(WIDTHS)
    model.load_state_dict(states[1])
    torch.testing.assert_close(model(x), render(editor.edit_stacked(table))[1])


def test_transformers_are_predicted_and_edited():
    torch.manual_seed(0)
    states = [ZooNet().state_dict() for _ in range(12)]
    spec = zoo_spec(states[0])
    frozen = torch.randn(3)
    told = [{**s, "embedding.table": frozen} for s in states]  # alike in all: tells nothing
    targets = torch.rand(12)
    predictor = WeightSpacePredictor(spec, channels=(4,), width=4).fit(told, targets, settings=FAST)
    own = WeightSpacePredictor(spec, module=TransformerNFN(spec, channels=(4,), width=4, sigmoid=False))
    own.module.load_state_dict(predictor.module.state_dict())
    torch.testing.assert_close(own.outputs_of(states), predictor.outputs_of(states))
    wrapped = [{f"_orig_mod.{n}": x for n, x in s.items()} for s in states]
    assert torch.equal(predictor.predict(wrapped), predictor.predict(states))
    other = WeightSpacePredictor(zoo_spec(wrapped[0]), channels=(4,), width=4).fit(wrapped, targets, settings=FAST)
    assert torch.equal(other.predict(states), other.predict(wrapped))
    editor = WeightSpaceEditor(spec, loss=lambda w, t: sum(x.square().sum() for x in w.values()) / len(t), width=3)
    editor.fit(states, targets, settings=FAST)
    edited = editor.edit(states)
    assert torch.equal(edited[0]["classifier.fc1.weight"], states[0]["classifier.fc1.weight"])
    assert not torch.equal(edited[0]["encoder.0.fc1.weight"], states[0]["encoder.0.fc1.weight"])


def test_measures_need_no_optional_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    table, targets = networks(30)
    assert "tau" in small("hnp").fit(table, targets, settings=FAST).history[-1]


# ------------------------------------------------------------------------------------------- errors
def refused(match, states=None, targets=None, kind=ValueError, count=20, **arguments):
    table, wanted = networks(count)
    with pytest.raises(kind, match=match):
        small("hnp", **arguments).fit(
            table if states is None else states, wanted if targets is None else targets, settings=FAST
        )


def test_networks_that_do_not_fit_are_named():
    table, targets = networks(20)
    states = [{n: x[i] for n, x in table.items()} for i in range(20)]
    mixed = [*states[:7], dict(mlp([3, 6, 4, 2]).state_dict()), *states[8:]]
    refused(r"network 7 has another architecture than network 0: 2.bias is \(4,\), not \(5,\)", mixed)
    short = [*states[:3], {n: x for n, x in states[3].items() if n != "0.bias"}, *states[4:]]
    refused("network 3 .* 0.bias is missing", short)
    other = [mlp([3, 7, 5, 2]) for _ in range(20)]
    refused(r"0.weight have shape \(1, 1, 7, 3\), expected \[batch, channels, 6, 3\]", other, kind=SymmetryError)
    refused("knows nothing of extra", {**table, "extra": torch.randn(20, 3)}, kind=SymmetryError)
    refused("one row per network", {**table, "0.bias": table["0.bias"][:5]})
    refused("no networks", [])
    broken = table["2.weight"].clone()
    broken[[4, 9], 0, 0] = float("nan")
    refused(
        "2.weight has values that are not finite in 2 of 20 networks, the first is network 4",
        {**table, "2.weight": broken},
    )


def test_targets_that_do_not_fit_are_named():
    _, targets = networks(20)
    refused("20 networks, but targets of shape", targets=targets[:-1])
    refused("not finite for 1 networks, the first is 3", targets=targets.index_fill(0, torch.tensor(3), float("nan")))
    refused(r"targets in \[0, 1\]", targets=3 * targets)
    refused("integer classes", targets=targets, loss="cross_entropy", outputs=3)
    refused("classes go from 5 to 5, outputs=3", targets=torch.full((20,), 5), loss="cross_entropy", outputs=3)
    refused("outputs=1: say outputs=", targets=torch.stack([targets, targets], 1))
    refused("unknown loss 'huber'", loss="huber")
    refused("leaves none on one side", count=1)


def test_settings_that_do_not_go_together_are_named():
    table, targets = networks(20)
    with pytest.raises(ValueError, match="pass a weight space"):
        WeightSpacePredictor()
    with pytest.raises(TypeError, match=r"of type Sequential. Pass infer_symmetry\(model, x\)"):
        WeightSpacePredictor(mlp(WIDTHS))
    spec = zoo_spec(ZooNet().state_dict())
    for make in (WeightSpacePredictor, partial(WeightSpaceEditor, loss=lambda w, t: t.sum())):
        with pytest.raises(ValueError, match="kind='hnp' has nothing to say"):
            make(spec, kind="hnp")
    with pytest.raises(ValueError, match="nothing to say"):
        WeightSpacePredictor(chain(), module=nn.Linear(1, 1), kind="hnp")
    with pytest.raises(SymmetryError, match="no scale"):
        WeightSpacePredictor(chain(None), kind="monomial")
    with pytest.raises(ValueError, match="unknown options"):
        WeightSpacePredictor(residual(), heads=3)
    with pytest.raises(SymmetryError):
        WeightSpacePredictor(residual(), kind="hnp")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"):
            small().fit(table, targets, device="cuda")
    for wrong in ({"epochs": 0}, {"schedule": "linear"}):
        with pytest.raises(ValueError):
            Fit(**wrong)
    with pytest.raises(ValueError, match="no plain data"):
        WeightSpacePredictor(chain(), channels=(torch.tensor(3),)).save("x")


# ------------------------------------------------------------------------------------------- parts
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30), st.integers(0, 10**6))
def test_measures_agree_with_their_definitions(values, seed):
    a = torch.tensor(values, dtype=torch.float64)
    b = torch.randint(-3, 4, a.shape, generator=torch.Generator().manual_seed(seed)).double()
    da, db = (torch.sign(x[:, None] - x) for x in (a, b))
    ties = (da.abs().sum() * db.abs().sum()).sqrt()
    assert kendall_tau(a, b) == pytest.approx(float((da * db).sum() / ties) if ties > 0 else 0.0, abs=1e-12)
    if b.unique().numel() > 1:
        assert r2(a, b) == pytest.approx(r2_score(b.numpy(), a.numpy()), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=40))
def test_the_rank_correlation_is_that_of_scipy(pairs):
    x, y = torch.tensor(pairs, dtype=torch.float32).T
    expected = float(kendalltau(x.numpy(), y.numpy()).statistic)
    assert kendall_tau(x, y) == (0.0 if math.isnan(expected) else pytest.approx(expected, abs=1e-15))


def test_a_prediction_that_is_not_finite_has_no_rank():
    assert math.isnan(kendall_tau(torch.tensor([0.1, float("nan"), 0.3]), torch.rand(3)))
    assert kendall_tau(torch.ones(3), torch.rand(3)) == 0.0


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text() | st.integers(), x, max_size=3),
        max_leaves=8,
    )
)
def test_checkpoint_trees_survive(tree):
    tensors = {}
    content = {"state": tree, 3: [torch.arange(4), {"tensor": torch.ones(2)}]}
    back = _from_plain(_to_plain(content, tensors), tensors)
    assert (
        back["state"] == tree
        and torch.equal(back[3][0], torch.arange(4))
        and torch.equal(back[3][1]["tensor"], torch.ones(2))
    )


def test_prepared_data_are_cut_and_joined():
    torch.manual_seed(0)
    spec = zoo_spec(ZooNet().state_dict())
    table = stacked([ZooNet() for _ in range(5)])
    packed = spec.pack({n: x.unsqueeze(1) for n, x in table.items()})
    for data in (packed, {"a": torch.randn(5, 2)}, torch.randn(5)):
        parts = [map_data(lambda x, i=i: x[i : i + 2], data) for i in (0, 2, 4)]
        assert repr(join_data(parts)) == repr(data)


def test_the_rate_rises_and_falls():
    fit = Fit(warmup=0.1)
    rates = [fit.rate(k, 100) for k in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3
    assert [Fit(schedule="constant", warmup=0.0).rate(k, 10) for k in range(10)] == [1.0] * 10


def test_progress_and_tensorboard(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    table, targets = networks(30)
    predictor = small("stat").fit(table, targets, settings=FAST, tensorboard=tmp_path, progress=True)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in events.Scalars("tau")] == pytest.approx([row["tau"] for row in predictor.history])
    assert "train_loss" in capsys.readouterr().err
