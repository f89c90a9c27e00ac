"""Messages through sine networks, and the experiments on them, at toy size."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from safetensors.torch import save_file
from torch import Generator

from learned_opt.nfn import Chain, InvariantNFN, SineCanonical, SineEditor, SineMessages, SineNFN
from learned_opt.symmetry import SymmetryError
from meta_train.weights import inr
from meta_train.weights.runs import Grid, Job, Run
from tasks.zoo import inr as zoos
from tasks.zoo.sources import images
from tasks.zoo.zoo import Zoo, ZooError

OMEGA = zoos.OMEGA


@pytest.fixture(scope="module")
def networks():
    """Five random sine networks, float64, and their chain."""
    generator = Generator().manual_seed(0)
    starts = [zoos.initial(generator) for _ in range(5)]
    weights = {name: torch.stack([w[name] for w in starts]).double() for name in zoos.NAMES}
    weights["net.1.linear.weight"] *= 3
    return weights, Chain.from_state_dict(starts[0], "sign")


def moved_by_the_group(weights, seed=1):
    """Permutations, signs and half turns of hidden units, one element per network; shifts are 0 for weights."""
    g = Generator().manual_seed(seed)
    w0, b0, w1, b1, w2, b2 = (weights[n] for n in zoos.NAMES)
    n, width = b0.shape

    def element():
        permutation = torch.rand(n, width, generator=g).argsort(1)
        sign = 2.0 * torch.randint(0, 2, (n, width), generator=g).double() - 1
        return permutation, sign, torch.randint(-3, 4, (n, width), generator=g).double()

    def act(w, b, after, h):
        permutation, sign, turns = h
        w, b = sign.unsqueeze(-1) * w, sign * b + turns * math.pi / OMEGA
        after = after * (sign * (1 - 2 * (turns % 2))).unsqueeze(1)
        rows = permutation.unsqueeze(-1)
        columns = permutation.unsqueeze(1).expand(-1, after.shape[1], -1)
        return w.gather(1, rows.expand_as(w)), b.gather(1, permutation), after.gather(2, columns)

    w0, b0, w1 = act(w0, b0, w1, element())
    w1, b1, w2 = act(w1, b1, w2, element())
    return dict(zip(zoos.NAMES, (w0, b0, w1, b1, w2, b2), strict=True))


def channel(weights):
    return {n: x.unsqueeze(1) for n, x in weights.items()}


def far(a, b):
    return float(((a - b).abs().max() / a.abs().max()).detach())


MIXINGS = ["random", "points", "none"]


@pytest.mark.parametrize("mixing", MIXINGS)
def test_the_whole_group_of_a_sine_network_leaves_the_classifier_alone(networks, mixing):
    weights, chain = networks
    moved = moved_by_the_group(weights)
    points = zoos.coordinates(9).double()
    assert far(zoos.forward(weights, points), zoos.forward(moved, points)) < 1e-12
    torch.manual_seed(0)
    model = SineNFN(chain, 4, channels=12, mixing=mixing).double()
    assert far(model(channel(weights)), model(channel(moved))) < 1e-12


def test_only_the_groups_shifts_leave_it_alone(networks):
    weights, chain = networks
    torch.manual_seed(0)
    model = SineNFN(chain, 4, channels=12).double()
    before = model(channel(weights))
    for name in ("net.0.linear.bias", "net.1.linear.bias"):
        wrong = {**weights, name: weights[name] + math.pi / OMEGA}  # what reads it is not negated
        assert far(before, model(channel(wrong))) > 1e-3
        turn = {**weights, name: weights[name] + 2 * math.pi / OMEGA}
        assert far(before, model(channel(turn))) < 1e-12
        near = {**weights, name: weights[name] + 1.9 * math.pi / OMEGA}
        assert far(before, model(channel(near))) > 1e-3


def test_without_mixtures_the_outputs_are_values_of_the_network(networks):
    weights, chain = networks
    messages = SineMessages(chain, 7, mixing="none").double()
    points = messages.inputs.T / OMEGA
    assert far(messages(channel(weights)).outputs[:, 0], zoos.forward(weights, points)[..., 0]) < 1e-12


@pytest.mark.parametrize("kind", ["np", "hnp", "monomial", "magep"])
def test_on_features_of_messages_every_kind_is_invariant_to_the_whole_group(networks, kind):
    weights, chain = networks
    torch.manual_seed(0)
    body = InvariantNFN(chain, 5, kind, in_channels=3, channels=(4,), head_width=8)
    model = SineNFN(chain, 4, channels=10, body=body, in_channels=3, width=5).double()
    moved = moved_by_the_group(weights)
    assert far(model(channel(weights)), model(channel(moved))) < 1e-10
    alone = InvariantNFN(chain, 4, kind, channels=(4,), head_width=8).double()
    assert far(alone(channel(weights)), alone(channel(moved))) > 1e-6


def test_the_canonical_form_is_the_same_for_the_whole_group_but_permutations(networks):
    weights, chain = networks
    moved = moved_by_the_group(weights)
    form = SineCanonical(chain)
    one, two = form(channel(weights)), form(channel(moved))
    for name in zoos.NAMES:
        a, b = one[name].flatten(1), two[name].flatten(1)
        assert far(a.sort(1).values, b.sort(1).values) < 1e-12
    torch.manual_seed(0)
    model = InvariantNFN(chain, 4, "hnp", channels=(4,), head_width=8).double()
    assert far(model(one), model(two)) < 1e-12
    assert far(model(channel(weights)), model(channel(moved))) > 1e-6
    unscaled = {n: x.squeeze(1) for n, x in one.items()}
    for i, name in enumerate(zoos.NAMES):
        factor = 1 if i > 3 else OMEGA
        width = 0.5 if i == 0 else 1 if i % 2 else 32**0.5
        unscaled[name] = unscaled[name] / (factor * width)
    points = zoos.coordinates(9).double()
    assert far(zoos.forward(weights, points), zoos.forward(unscaled, points)) < 1e-12


@pytest.mark.parametrize("mixing", MIXINGS)
def test_gradients_are_autograds(networks, mixing):
    weights, chain = networks
    torch.manual_seed(0)
    messages = SineMessages(chain, 6, mixing=mixing).double()
    inputs = {n: x.clone().requires_grad_() for n, x in channel(weights).items()}
    codes = messages(inputs)
    factors = torch.randn(5, 2, *codes.outputs.shape[1:], dtype=torch.float64)
    found = messages.gradient(inputs, codes, factors)
    for c in range(2):
        total = (factors[:, c] * codes.outputs).sum()
        expected = torch.autograd.grad(total, list(inputs.values()), retain_graph=True)
        for name, x in zip(inputs, expected, strict=True):
            assert far(x[:, 0], found[name][:, c]) < 1e-12


def test_the_editor_commutes_with_the_whole_group(networks):
    weights, chain = networks
    torch.manual_seed(0)

    def errors(model):
        edit = lambda w: {n: x.squeeze(1) for n, x in model.double()(channel(w)).items()}  # noqa: E731
        one, two = moved_by_the_group(edit(weights)), edit(moved_by_the_group(weights))
        there = moved_by_the_group(weights)
        return [far(one[n], two[n]) for n in zoos.NAMES], [far(one[n], there[n]) for n in zoos.NAMES]

    found, changed = errors(SineEditor(chain, side=4, steps=2, rate=1e-3))
    assert max(found) < 1e-12 and min(changed) > 1e-6  # it does edit
    for kind, exact in {"monomial": True, "hnp": False, "magep": False}.items():
        layers = inr.editor_layers(chain, kind, 2, 3)
        found, _ = errors(SineEditor(chain, layers, in_channels=2, side=4, steps=2, rate=1e-3))
        assert (max(found) < 1e-10) == exact


def test_messages_refuse_relu():
    with pytest.raises(SymmetryError, match="sine units"):
        SineMessages(Chain.from_state_dict(zoos.build().state_dict(), "positive"), 4)


def test_moved_networks_are_moved_images(networks):
    weights, _ = networks
    weights = {n: x.float() for n, x in weights.items()}
    features = channel(weights)
    one = inr.moved(features, Generator().manual_seed(3))
    shifted = inr.moved(features, Generator().manual_seed(3), turn=0, scale=0)
    d = (shifted["net.0.linear.bias"] - features["net.0.linear.bias"]).squeeze(1)  # = W d
    offset = torch.linalg.lstsq(weights["net.0.linear.weight"], d.unsqueeze(-1)).solution.mT
    points = zoos.coordinates(6)
    there = torch.cat(
        [zoos.forward({n: x[i : i + 1] for n, x in weights.items()}, points + offset[i]) for i in range(5)]
    )
    assert far(there, zoos.forward({n: x.squeeze(1) for n, x in shifted.items()}, points)) < 1e-4
    assert far(features["net.0.linear.weight"], one["net.0.linear.weight"]) > 1e-2


def test_edits_of_pixels():
    x = torch.full((1, 1, 4, 4), -1.0)
    x[0, 0, 1, 1] = 0.5
    assert inr.dilate(x)[0, 0].eq(0.5).sum() == 9
    assert inr.contrast(x)[0, 0, 1, 1] == 1 and inr.contrast(-x / 8).max() == 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A zoo of sixty digits, hardly fitted."""
    out = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LEARNED_OPT_DATA", raising=False)
        zoos.make(zoos.Settings(steps=12), out / "zoo", 60, None, chunk=60)
        yield out / "zoo", None


def test_classification_from_nothing_to_table(folder, tmp_path, capsys):
    zoo, data = folder
    grid = Grid(tmp_path, seeds=2, methods=("MLP", "head", "HNP"))
    settings = inr.Classification(passes=90, batch=16)
    inr.classification(grid, settings, zoo=zoo, count=60, data=data)
    cells = json.loads((tmp_path / "table.json").read_text())["cells"]
    assert {(c["method"], c["dataset"]): c["seeds"] for c in cells} == {
        ("MLP", "weights"): 2,
        ("HNP", "weights"): 1,
        ("HNP", "canonical"): 1,
        ("HNP", "messages"): 2,
        ("head", "messages"): 2,
    }
    assert (tmp_path / "picture.png").stat().st_size > 1000
    before = (tmp_path / "runs.jsonl").read_text()
    inr.classification(grid, settings, zoo=zoo, count=60, data=data)
    assert (tmp_path / "runs.jsonl").read_text() == before
    assert "runs: 8 of " in capsys.readouterr().out
    assert "All train on 45 networks" in (tmp_path / "table.md").read_text()
    other = Zoo.load(zoo / "zoo.safetensors")
    replace(other, targets=other.targets.flip(0)).save(tmp_path / "other" / "zoo.safetensors")
    grid = Grid(tmp_path, seeds=1, methods=("MLP",))
    inr.classification(grid, settings, zoo=tmp_path / "other", count=60, data=data)
    said = capsys.readouterr().out
    assert "[runs 1/1]" in said and "already there" not in said


def test_notes_are_those_of_the_stored_tables():
    stored = Path(__file__).parents[3] / "experiments" / "results" / "weights" / "inr" / "classification" / "table.md"
    assert inr.NOTE.format(train=7_500) in stored.read_text()


def test_editing_learns_and_shows_it(folder, tmp_path):
    zoo, data = folder
    grid = Grid(tmp_path, seeds=1, methods=("steps", "Monomial + steps"), datasets=("dilate",))
    inr.editing(grid, inr.Editing(passes=180, batch=5, pixels=64), zoo=zoo, count=60, data=data)
    table = json.loads((tmp_path / "table.json").read_text())
    for cell in table["cells"]:
        assert cell["mean"] < table["about"]["unedited"]["dilate"]
    assert (tmp_path / "dilate.png").stat().st_size > 1000
    kept = {path.name for path in (tmp_path / "examples").iterdir()}
    few = inr.Editing(passes=5, batch=5, pixels=8)
    inr.editing(replace(grid, methods=("steps",)), few, zoo=zoo, count=60, data=data)
    now = {path.name for path in (tmp_path / "examples").iterdir()}
    assert len(kept) == 2 and kept < now and len(now) == 3  # of other settings, beside those


def test_pictures_show_the_runs_of_the_table(tmp_path, monkeypatch):
    jobs = [Job(m, "dilate", 0, {"zoo": z}) for z in "ab" for m in ("steps", "MLP")]
    names = ("image", "network", "wanted", "edited")
    for value, job in enumerate(jobs):
        path = inr.example_path(tmp_path, job)
        path.parent.mkdir(exist_ok=True)
        save_file({n: torch.full((8, 1, 4, 4), float(value)) for n in names}, path)
    shown = []
    monkeypatch.setattr(Axes, "imshow", lambda _, picture, **options: shown.append(float(picture[0, 0])))
    inr.draw_examples(tmp_path, "dilate", [Run(jobs[2], {}, 0.0), Run(replace(jobs[3], seed=1), {}, 0.0)])
    assert shown == [2.0] * 8 * 4  # image, network, wanted and edited of one job


def test_a_missing_zoo_is_generated(folder, tmp_path):
    chain, zoo = inr.zoo_of(tmp_path / "new", 8, folder[1])
    assert len(zoo) == 8 and chain.widths == (2, 32, 32, 1) and chain.scale == "sign"
    assert (tmp_path / "new" / "zoo.safetensors").is_file()


def test_a_zoo_of_other_networks_is_refused(folder, tmp_path):
    zoo = Zoo.load(folder[0] / "zoo.safetensors")
    replace(zoo, about={"kind": "cnn"}).save(tmp_path / "zoo.safetensors")
    with pytest.raises(ZooError, match="zoo of cnn networks, not of sine networks"):
        inr.zoo_of(tmp_path, 60)


def test_a_zoo_of_other_images_is_refused(folder):
    zoo, data = folder
    _, whole = inr.zoo_of(zoo, 60)
    assert images(data)[0] == "digits"
    wrong = type(whole)(whole.weights, whole.targets, whole.columns, whole.splits, {**whole.about, "dataset": "mnist"})
    with pytest.raises(ZooError, match="--data"):
        inr.edited_images("dilate", wrong, data)
