"""A fit that is resumed is the uninterrupted one, another one is refused, and files keep what was fitted."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from learned_opt import CheckpointError
from learned_opt.nfn import Fit, WeightSpaceEditor, WeightSpacePredictor
from learned_opt.nfn.fit.training import CHECKPOINT
from learned_opt.nfn.fit.weight_spaces import space_from_data, space_to_data
from learned_opt.nfn.transformer_space import task_spec, zoo_spec
from tasks.transformer import Transformer
from tests.inferred import infer
from tests.nfn.chains import mlp
from tests.nfn.fit.test_fitting import FAST, WIDTHS, chain, networks, same, small, weights_of
from tests.nfn.test_general import residual
from tests.nfn.test_transformer_nfn import ZooNet


# ------------------------------------------------------------------------------------------- resume
def long_fit(folder, die=None):
    """Five epochs of ten minibatches with dropout and augmentation; the process kills itself in one of them."""
    table, targets = networks(50)
    calls = []

    def augment(features, generator):
        calls.append(1)
        if len(calls) == die:
            os.kill(os.getpid(), signal.SIGKILL)
        return {
            n: x * (1 + 0.1 * torch.rand(len(x), 1, generator=generator)[(...,) + (None,) * (x.ndim - 2)])
            for n, x in features.items()
        }

    fit = Fit(epochs=5, batch=4, lr=1e-2, checkpoint_seconds=0)
    return small("hnp", dropout=0.5).fit(table, targets, settings=fit, augment=augment, folder=folder)


def test_a_killed_and_resumed_fit_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    killed = tmp_path / "killed"
    code = "import sys; from tests.nfn.fit.test_resume import long_fit; long_fit(sys.argv[1], 25)"
    found = subprocess.run([sys.executable, "-c", code, str(killed)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert found.returncode == -signal.SIGKILL  # in the middle of the third epoch
    assert os.listdir(killed) == [CHECKPOINT]
    resumed, whole = long_fit(killed), long_fit(None)
    assert same(weights_of(resumed), weights_of(whole)) and resumed.history == whole.history
    assert [row["epoch"] for row in whole.history] == [0, 1, 2, 3, 4]


def test_after_an_interruption_the_best_so_far_is_in_place(tmp_path):
    table, targets = networks(60)
    rows = []

    def stop(features, generator):
        rows.append(1)
        if len(rows) == 8:
            raise KeyboardInterrupt
        return features

    predictor = small("hnp")
    with pytest.raises(KeyboardInterrupt):
        predictor.fit(table, targets, settings=FAST, augment=stop, folder=tmp_path)
    assert not predictor.module.training
    content = predictor.predict(table)
    assert content.isfinite().all()
    resumed = small("hnp").fit(table, targets, settings=FAST, augment=lambda x, _: x, folder=tmp_path)
    whole = small("hnp").fit(table, targets, settings=FAST, augment=lambda x, _: x)
    assert same(weights_of(resumed), weights_of(whole)) and resumed.history == whole.history
    again = small("hnp").fit(table, targets, settings=FAST, folder=tmp_path)  # a finished fit is read, not repeated
    assert same(weights_of(again), weights_of(whole))


def test_a_checkpoint_of_another_fit_or_a_damaged_one_is_refused(tmp_path):
    table, targets = networks(60)
    small("hnp").fit(table, targets, settings=FAST, folder=tmp_path)
    for other, data in ((Fit(epochs=5, batch=16, lr=3e-3), targets), (FAST, 1 - targets)):
        with pytest.raises(CheckpointError, match="another fit"):
            small("hnp").fit(table, data, settings=other, folder=tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole"):
        small("hnp").fit(table, targets, settings=FAST, folder=tmp_path)


def sgd(momentum):
    return lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=momentum)


OTHERS = {
    "seed": ({"seed": 1}, {}),
    "kind": ({"kind": "np"}, {}),
    "dropout": ({"dropout": 0.5}, {}),
    "loss": ({"loss": "mse"}, {}),
    "no validation": ({}, {"validation": None}),
    "validation": ({}, {"validation": "other"}),
    "optimizer": ({}, {"optimizer": sgd(0.9)}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_says_which_fit_it_is_of(tmp_path, what):
    table, targets = networks(60)
    held = ({n: x[40:] for n, x in table.items()}, targets[40:])
    base = {"validation": held, "settings": FAST, "folder": tmp_path}
    train = {n: x[:40] for n, x in table.items()}, targets[:40]
    small("hnp").fit(*train, **base)
    made, fitted = OTHERS[what]
    if fitted.get("validation") == "other":
        fitted = {"validation": (held[0], held[1].flip(0))}
    with pytest.raises(CheckpointError, match="another fit"):
        small(**{"kind": "hnp"} | made).fit(*train, **base | fitted)
    again = small("hnp").fit(*train, **base)
    assert same(weights_of(again), weights_of(small("hnp").fit(*train, **base | {"folder": None})))


def test_options_of_an_optimizer_and_modules_of_ones_own_are_told_apart(tmp_path):
    table, targets = networks(40)
    small("hnp").fit(table, targets, settings=FAST, folder=tmp_path / "a", optimizer=sgd(0.9))
    with pytest.raises(CheckpointError, match="momentum=0.9.*momentum=0.5"):
        small("hnp").fit(table, targets, settings=FAST, folder=tmp_path / "a", optimizer=sgd(0.5))

    class Own(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 1))

        def forward(self, features):
            return self.layers(features["0.bias"][:, 0])

    WeightSpacePredictor(module=Own(4)).fit(table, targets, settings=FAST, folder=tmp_path / "b")
    with pytest.raises(CheckpointError, match="another module"):
        WeightSpacePredictor(module=Own(5)).fit(table, targets, settings=FAST, folder=tmp_path / "b")


def test_an_optimizer_of_ones_own_is_resumed_too(tmp_path):
    table, targets = networks(60)

    def fit(folder, stop=None):
        count = []

        def augment(features, generator):
            count.append(1)
            if len(count) == stop:
                raise KeyboardInterrupt
            return features

        return small("hnp").fit(table, targets, settings=FAST, augment=augment, folder=folder, optimizer=sgd(0.9))

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "a", stop=8)
    assert same(weights_of(fit(tmp_path / "a")), weights_of(fit(tmp_path / "b")))


def test_divergence_is_told_and_what_was_best_stays():
    table, targets = networks(60)
    with pytest.raises(FloatingPointError, match="smaller lr"):
        small("hnp", loss=lambda y, t: y.sum() * float("nan")).fit(table, targets, settings=FAST)
    count = []

    def later(outputs, wanted):
        count.append(outputs.requires_grad)
        return (outputs[:, 0] - wanted).square().mean() * (float("nan") if sum(count) > 5 else 1.0)

    predictor = small("hnp", loss=later)
    with pytest.warns(UserWarning, match="not finite"):
        predictor.fit(table, targets, settings=FAST)
    assert predictor.predict(table).isfinite().all()


# ------------------------------------------------------------------------------------------- files
def saved_and_loaded(fitted, path, **arguments):
    fitted.save(path)
    return type(fitted).load(path, **arguments)


@pytest.mark.parametrize("kind", ["monomial", "stat", "magep"])
def test_saved_predictors_predict_the_same(tmp_path, kind):
    table, targets = networks(40)
    predictor = small(kind, standardise=True).fit(table, targets, settings=FAST)
    loaded = saved_and_loaded(predictor, tmp_path / "p.safetensors")
    assert torch.equal(loaded.predict(table), predictor.predict(table))
    assert (loaded.space, loaded.kind) == (predictor.space, kind)


def test_saved_general_and_own_modules(tmp_path):
    table, targets = networks(30)
    general = WeightSpacePredictor(infer(mlp(WIDTHS)), kind="general", channels=(3,), head_width=8)
    general.fit(table, targets, settings=FAST)
    assert torch.equal(saved_and_loaded(general, tmp_path / "g.safetensors").predict(table), general.predict(table))

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(len(chain().names), 1)

        def forward(self, features):
            return self.head(torch.cat([x.flatten(1).sum(1, keepdim=True) for x in features.values()], 1))

    def loss(outputs, wanted):
        return (outputs[:, 0] - wanted).square().mean()

    own = WeightSpacePredictor(module=Sums(), loss=loss).fit(table, targets, settings=FAST)
    path = tmp_path / "own.safetensors"
    assert torch.equal(saved_and_loaded(own, path, module=Sums(), loss=loss).predict(table), own.predict(table))
    with pytest.raises(CheckpointError, match="pass module="):
        WeightSpacePredictor.load(path, loss=loss)
    with pytest.raises(CheckpointError, match="pass loss="):
        WeightSpacePredictor.load(path, module=Sums())
    with pytest.raises(CheckpointError, match=r"WeightSpacePredictor\.load"):
        WeightSpaceEditor.load(path, loss=loss)


def test_a_saved_editor_edits_the_same_and_damage_is_seen(tmp_path):
    table, targets = networks(30)
    editor = WeightSpaceEditor(chain(), loss=lambda w, t: w["0.weight"].square().mean(), width=3)
    editor.fit(table, targets, settings=FAST)
    path = tmp_path / "e.safetensors"
    loaded = saved_and_loaded(editor, path, loss=editor.loss)
    assert same(loaded.edit_stacked(table), editor.edit_stacked(table))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="altered"):
        WeightSpaceEditor.load(path, loss=editor.loss)
    with pytest.raises(CheckpointError, match="no such file"):
        WeightSpaceEditor.load(tmp_path / "none.safetensors", loss=editor.loss)


def test_spaces_survive_being_plain_data():
    model = Transformer(nn.Embedding(5, 4), 3, 5, width=4, heads=2, depth=2, hidden=3, causal=True, fused=True)
    for space in (chain(), chain(None), task_spec(model.state_dict(), 2), zoo_spec(ZooNet().state_dict()), residual()):
        assert space_from_data(space_to_data(space)) == space
    assert space_from_data(space_to_data(None)) is None
