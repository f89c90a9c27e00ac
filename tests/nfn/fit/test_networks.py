"""What networks may be given as data: modules and state_dicts, wrapped or tied, with statistics and masks."""

import math

import pytest
import torch
from torch import nn

from learned_opt import SymmetryError, infer_symmetry
from learned_opt.nfn import WeightSpaceEditor, WeightSpacePredictor
from tests.nfn.fit.test_fitting import FAST, chain, networks, small


class Masked(nn.Module):
    """A batch norm, a mask that is alike in all networks, and a parameter under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.c = nn.Linear(6, 4, bias=False)
        self.c.weight = self.b.weight
        self.norm.running_mean.normal_()
        self.register_buffer("mask", torch.full((5, 5), -math.inf).triu(1))

    def forward(self, x):
        h = self.norm(self.mask.softmax(-1) @ self.a(x)).relu()
        return self.b(h) + self.c(h)


def test_modules_with_statistics_masks_and_tied_parameters():
    torch.manual_seed(0)
    models, targets = [Masked().eval() for _ in range(12)], torch.rand(12)
    space = infer_symmetry(models[0], torch.randn(5, 4))
    predictor = WeightSpacePredictor(space, channels=(3,), head_width=8).fit(models, targets, settings=FAST)
    states = [m.state_dict() for m in models]
    assert "c.weight" in states[0]
    assert torch.equal(predictor.predict(states), predictor.predict(models))
    for state in states:
        del state["c.weight"]
    assert torch.equal(predictor.predict(states), predictor.predict(models))
    states[2]["other"] = torch.randn(3)
    with pytest.raises(SymmetryError, match=r"other is missing|other is \(3,\)"):
        predictor.predict(states)
    own = WeightSpacePredictor(module=TotalOfMeans()).fit(models, targets, settings=FAST)  # without the mask
    assert own.predict(models).isfinite().all()
    models[3].norm.running_mean[2] = math.nan
    with pytest.raises(ValueError, match="norm.running_mean has values that are not finite in 1 of 12"):
        predictor.predict(models)


class Wrapped(nn.Module):
    """A network as wrappers hold it: under a name of their own."""

    def __init__(self, name, network):
        super().__init__()
        self.add_module(name, network)

    def forward(self, x):
        return next(self.children())(x)


WRAPPERS = {
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "FSDP": lambda m: Wrapped("_fsdp_wrapped_module", m),
    "checkpointed inside": lambda m: nn.Sequential(*(Wrapped("_checkpoint_wrapped_module", x) for x in m)),
    "several": lambda m: torch.compile(Wrapped("module", Wrapped("module", Wrapped("_fsdp_wrapped_module", m)))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("space_of", ["plain", "wrapped"])
def test_wrapped_networks_are_the_same_data_and_load_what_is_edited(wrap, space_of):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)) for _ in range(12)]
    wrapped = [wrap(m) for m in models]
    x, targets = torch.randn(4, 2), torch.rand(12)
    space = infer_symmetry((models if space_of == "plain" else wrapped)[0], x)
    predictor = WeightSpacePredictor(space, kind="general", channels=(3,), head_width=8)
    predictor.fit(wrapped, targets, settings=FAST)
    states = [m.state_dict() for m in wrapped]
    for same in (models, states, models[:6] + wrapped[6:]):
        assert torch.equal(predictor.predict(same), predictor.predict(wrapped))
    editor = WeightSpaceEditor(space, kind="general", loss=lambda w, t: sum(v.square().sum() for v in w.values()))
    editor.fit(states, targets, settings=FAST)
    wanted = editor.edit_stacked(models)
    for of in (wrapped, states):
        wrapped[1].load_state_dict(editor.edit(of)[0])
        assert torch.equal(models[1][0].weight, next(iter(wanted.values()))[0])


@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize("as_states", [False, True])
def test_edited_networks_are_loaded_whole_with_second_names_and_buffers(count, as_states):
    torch.manual_seed(0)
    models = [Masked().eval() for _ in range(12)]
    editor = WeightSpaceEditor(
        infer_symmetry(models[0], torch.randn(5, 4)), channels=(3,), loss=lambda w, t: (w["b.weight"] - 1).norm()
    ).fit(models, torch.zeros(12), settings=FAST)
    given = [m.state_dict() for m in models[:count]] if as_states else models[:count]
    before = [{n: x.clone() for n, x in m.state_dict().items()} for m in models]
    edited = editor.edit(given)
    fresh = Masked()
    fresh.load_state_dict(edited[0])
    assert edited[0].keys() == before[0].keys() and fresh.c.weight is fresh.b.weight
    assert torch.equal(edited[0]["c.weight"], edited[0]["b.weight"])
    assert not torch.equal(fresh.b.weight, before[0]["b.weight"])
    assert torch.equal(edited[0]["mask"], before[0]["mask"])
    edited[0]["mask"].zero_()  # what is handed back is a copy
    assert all(torch.equal(models[0].state_dict()[n], x) for n, x in before[0].items())


def test_nothing_is_predicted_before_a_fit(tmp_path):
    table, targets = networks(12)
    predictor = small()
    editor = WeightSpaceEditor(chain(), loss=lambda w, t: t.sum(), width=4)
    for call in (
        lambda: predictor.predict(table),
        lambda: predictor.outputs_of(table),
        lambda: predictor.score(table, targets),
        lambda: predictor.save(tmp_path / "p.safetensors"),
        lambda: editor.edit([{n: x[0] for n, x in table.items()}]),
        lambda: editor.edit_stacked(table),
    ):
        with pytest.raises(RuntimeError, match=r"not fitted: call fit"):
            call()
    own = WeightSpacePredictor(module=predictor.module)  # may have been fitted elsewhere
    assert own.predict(table).shape == (12,)


def test_outputs_that_overflow_are_told_with_the_network():
    table, targets = networks(24)
    predictor = small("magep").fit(table, targets, settings=FAST)
    large = {n: torch.cat([x[:3], x[3:4] * 1e30]) for n, x in table.items()}
    with pytest.warns(UserWarning, match="not finite for 1 of 4 networks, the first is network 3"):
        predictor.predict(large)
    with pytest.warns(UserWarning, match="measures are not finite"):
        predictor.score(large, targets[:4])


class TotalOfMeans(nn.Module):
    """A module that reads whatever there is."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1)

    def forward(self, features):
        return self.head(sum(x.flatten(1).mean(1, keepdim=True) for x in features.values()))
