"""The transformer experiment and the efficiency table on toy data."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from learned_opt.nfn.transformer_invariants import transformer_invariants
from learned_opt.nfn.transformer_space import TransformerFeatures, zoo_spec
from meta_train.errors import UsageError
from meta_train.weights import efficiency, transformer
from meta_train.weights.__main__ import main
from meta_train.weights.runs import Grid, Job, Run
from tasks.zoo import augment
from tasks.zoo import transformer as zoos
from tasks.zoo.zoo import Zoo, ZooError
from tests.nfn.test_transformer_nfn import ZooNet


def toy_zoo(count: int) -> Zoo:
    """Random networks, two checkpoints to a run; a larger deviation means a higher accuracy."""
    torch.manual_seed(0)
    spread = torch.rand(count) + 0.05
    shapes = {n: p.shape for n, p in zoos.Network().named_parameters()}
    weights = {n: spread.view(-1, *(1,) * len(s)) * torch.randn(count, *s) for n, s in shapes.items()}
    columns = {"run": [f"r{i // 2}" for i in range(count)], "ckpt_epoch": ["1", "2"] * (count // 2)}
    return Zoo(weights, spread / 1.05, columns, {}, {"kind": "transformer", "dataset": "digits"})


# ------------------------------------------------------------------------------------ invariants
@pytest.mark.parametrize("stream", ["block", "fixed", "shared"])
def test_invariants_do_not_change(stream):
    state = {n: p.detach().double() for n, p in ZooNet(residual=stream != "block").named_parameters()}
    spec = zoo_spec(state, heads=3, stream=stream)
    features = spec.pack({n: torch.randn(2, 3, *x.shape, dtype=torch.float64) for n, x in state.items()})
    before = transformer_invariants(spec, features)
    moved = spec.act(spec.sample(condition=100.0), features)
    assert before.shape[0] == 2 and before.isfinite().all()
    torch.testing.assert_close(transformer_invariants(spec, moved), before, rtol=1e-9, atol=1e-9)
    # the controls: queries stay behind; units of one matrix move, which only products with the next one can tell
    wrong = [dict(moved.blocks, q=features.blocks["q"]), dict(moved.blocks, b=moved.blocks["b"].roll(1, -2))]
    for blocks in wrong:
        assert (transformer_invariants(spec, TransformerFeatures(blocks, moved.rest)) - before).abs().max() > 1e-2


def test_the_prediction_does_not_change_when_the_network_is_moved():
    zoo = toy_zoo(6)
    zoo = Zoo({n: w.double() for n, w in zoo.weights.items()}, zoo.targets)
    spec = zoo_spec(zoo.state_dict(0))
    moved = augment.augment(zoo, spec, high=20.0)

    def table(states):
        features = {n: x.unsqueeze(1) for n, x in states.items()}
        return features | {"invariants": transformer_invariants(spec, spec.pack(features)).unsqueeze(1)}

    features = table(moved.weights)
    model = transformer.InformedTransformerNFN(
        spec, features["invariants"].squeeze(1)[:3], channels=(2,), width=8, dropout=0.0
    ).double()
    with torch.no_grad():
        model.learned.head.weight.normal_()  # it begins at zero
        one, two = model(features).chunk(2)
        wrong = moved.weights | {"encoder.0.fc1.weight": moved.weights["encoder.0.fc1.weight"].roll(6, 0)}
        three = model(table(wrong)).chunk(2)[1]
    torch.testing.assert_close(two, one, rtol=1e-8, atol=1e-8)
    assert (three - two).abs().max() > 1e-4 and one.std() > 1e-3


def test_the_mlp_has_the_published_size():
    shapes = {n: p.shape for n, p in zoos.Network().named_parameters()}
    assert sum(p.numel() for p in transformer.PartsMLP(shapes).parameters()) == 933_251


# ------------------------------------------------------------------------------------ data
def test_a_network_is_in_one_split_and_low_accuracies_are_left_out():
    zoo = toy_zoo(200)
    zoo = Zoo({**zoo.weights, "row": torch.arange(200.0)}, zoo.targets, zoo.columns)
    parts = transformer.splits(zoo, 0.4, seed=1)
    runs = [{int(r) // 2 for r in table["row"]} for table, _ in parts.values()]
    assert sum(map(len, runs)) == len(set().union(*runs))
    assert sum(len(y) for _, y in parts.values()) == int((zoo.targets >= 0.4).sum())
    for table, places in parts.values():  # targets are places in the order of the accuracies, all of 0.4 or more
        accuracies = zoo.targets[table["row"].long()]
        assert accuracies.min() >= 0.4 and 0 <= places.min() <= places.max() <= 1
        assert bool((places[accuracies.argsort()].diff() >= 0).all())
    other = transformer.splits(zoo, 0.4, seed=2)
    assert set(parts["test"][0]["row"].tolist()) != set(other["test"][0]["row"].tolist())
    with pytest.raises(ZooError, match="more networks"):
        transformer.splits(zoo, 0.99, seed=0)


def test_the_experiment_from_a_zoo_to_a_table(tmp_path, capsys, monkeypatch):
    toy_zoo(80).save(tmp_path / "zoo" / "zoo.safetensors")
    methods = ["Transformer-NFN", "StatNN", "MLP", "forest-statistics", "boosting-statistics"]
    options = ["--zoo-mnist", str(tmp_path / "zoo"), "--seeds", "2", "--passes", "150", "--batch", "16"]
    monkeypatch.setattr(transformer, "LEAST_TEST_ROWS", 6)
    options += ["--methods", *methods, "--datasets", "mnist", "mnist-80"]
    main(["transformer", "--out", str(tmp_path / "out"), *options])
    assert "mnist-80 is left out" in capsys.readouterr().out
    found = {c["method"]: c for c in json.loads((tmp_path / "out" / "table.json").read_text())["cells"]}
    assert set(found) == set(methods) and all(c["seeds"] == 2 for c in found.values())
    assert found["forest-statistics"]["mean"] > 0.7  # the deviation is easy to see
    assert (tmp_path / "out" / "picture.png").stat().st_size > 1000
    main(["transformer", "--out", str(tmp_path / "out"), *options])
    assert "runs: 10 of " in capsys.readouterr().out
    assert "| digits " in (tmp_path / "out" / "table.md").read_text()
    zoo = toy_zoo(80)
    replace(zoo, targets=zoo.targets.flip(0)).save(tmp_path / "zoo" / "zoo.safetensors")
    transformer.prepared.cache_clear()
    options[options.index("--methods") :] = ["--methods", "StatNN", "--datasets", "mnist"]
    main(["transformer", "--out", str(tmp_path / "out"), *options])
    assert "[runs 2/2]" in capsys.readouterr().out  # of another zoo


def test_titles_are_of_the_zoos_data():
    runs = [
        Run(Job("MLP", d, 0, {"examples": e}), {}, 0.0)
        for d, e in (("mnist", "digits"), ("mnist-20", "mnist"), ("ag_news-40", "ag_news"))
    ]
    assert [*map(transformer.title_of, runs)] == ["digits", "MNIST ≥ 20%", "AG News ≥ 40%"]


def test_what_cannot_be_run_is_said_before_a_zoo_is_generated(tmp_path, monkeypatch):
    monkeypatch.delenv("LEARNED_OPT_DATA", raising=False)
    zoo = toy_zoo(8)
    new, old = tmp_path / "new", tmp_path / "old"
    folders = ["--zoo-mnist", str(new), "--zoo-ag-news", str(old)]

    def refused(match):
        with pytest.raises(SystemExit, match=match):
            main(["transformer", "--out", str(tmp_path / "out"), "--count", "1", *folders])
        assert not new.exists()

    refused("LEARNED_OPT_DATA")
    zoo.save(old / "zoo.safetensors")
    refused("transformer networks on digits, not of transformers on ag_news")
    replace(zoo, about={"kind": "inr", "dataset": "ag_news"}).save(old / "zoo.safetensors")
    refused("inr networks on ag_news")


# ------------------------------------------------------------------------------------ efficiency
def test_kept_bytes_are_those_of_the_formula():
    x = torch.randn(10, 30, requires_grad=True)
    assert efficiency.kept_bytes(lambda: x.exp().sum(), [x]) == 4 * 300  # exp keeps its result
    assert efficiency.kept_bytes(lambda: (2 * x).sum(), [x]) == 0
    assert efficiency.kept_bytes(lambda: x.square().sum(), []) == 4 * 300  # the input, if it is not known


def test_parameters_are_the_official_integers():
    for task, models in efficiency.MODELS.items():
        for name, model in models.items():
            official = model.official[0]
            if official is None or name == "graph" or official > 1e7:  # another graph model; slow to make
                continue
            made, _ = model.make()
            assert sum(p.numel() for p in made.parameters() if p.requires_grad) == official, (task, name)


def test_the_efficiency_table(tmp_path, monkeypatch):
    monkeypatch.setattr(efficiency, "LEAST_SECONDS", 0.0)
    options = ["--datasets", "cnn", "transformer", "--methods", "StatNN", "Transformer-NFN-4-channels", "--seeds", "2"]
    main(["efficiency", "--out", str(tmp_path), *options])
    text = (tmp_path / "table.md").read_text()
    assert "1,059,001 (1,059,001)" in text and "transformer: Transformer-NFN-4-channels" in text
    cells = json.loads((tmp_path / "table.json").read_text())["cells"]
    assert {c["measure"] for c in cells} == {"parameters", "ms", "kept_mb"} and all(c["mean"] > 0 for c in cells)


def test_efficiency_is_of_the_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="processor"):
        efficiency.efficiency(Grid(tmp_path, seeds=1, datasets=("cnn",), methods=("StatNN",), device="cuda"))


def test_ranks_are_places_among_the_training_rows():
    ranks = transformer.Ranks(torch.tensor([[0.0, 5.0], [1.0, 6.0], [1e9, 7.0], [-1e9, 8.0]]))
    wanted = torch.tensor([[0.0, -2 / 3], [1.0, -1.0]])
    torch.testing.assert_close(ranks(torch.tensor([[0.5, 5.5], [1e20, -1.0]])), wanted)


def test_a_linear_layer_keeps_no_more_than_its_input():
    model = nn.Linear(40, 3)
    x = torch.randn(8, 40)
    found = efficiency.measure(model, x, [x], seconds=0.0)
    assert found["parameters"] == 123 and found["kept_mb"] == pytest.approx(8 * 3 * 4 / 1e6)  # the loss keeps 8 x 3
