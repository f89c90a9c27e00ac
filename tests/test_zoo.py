import csv
import gzip

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from learned_opt.nfn import zoo_spec
from tasks.zoo import augment, cnn, inr, training, transformer
from tasks.zoo.__main__ import main
from tasks.zoo.sources import Examples, image_examples, images, word_vectors
from tasks.zoo.zoo import Zoo, ZooError
from tests.inferred import infer

TINY = cnn.Settings(images=200, steps=6, checkpoints=(2, 6), batch=16)


def random_weights(model: nn.Module, count: int) -> dict[str, torch.Tensor]:
    return {n: 0.3 * torch.randn(count, *p.shape, dtype=torch.float64) for n, p in model.named_parameters()}


def toy_zoo(count: int = 6) -> Zoo:
    weights = random_weights(cnn.build(), count)
    columns = {"config.activation": ["relu", "tanh"] * (count // 2), "step": [86] * count}
    columns["test_accuracy"] = torch.rand(count).tolist()
    return Zoo({n: w.float() for n, w in weights.items()}, torch.tensor(columns["test_accuracy"]), columns)


def assert_same(one: Zoo, two: Zoo, **tolerance) -> None:
    assert list(one.weights) == list(two.weights) and one.columns.keys() == two.columns.keys()
    for name, w in one.weights.items():
        torch.testing.assert_close(two.weights[name], w, **tolerance)
    torch.testing.assert_close(two.targets, one.targets, **tolerance)


# ------------------------------------------------------------------------------------------ one file
def test_a_zoo_comes_back_from_its_file(tmp_path):
    zoo = toy_zoo(10).split(0.5, 0.2)
    zoo.save(tmp_path / "zoo.safetensors")
    back = Zoo.load(tmp_path / "zoo.safetensors")
    assert_same(zoo, back, rtol=0, atol=0)
    assert back.columns == dict(zoo.columns)
    assert {n: len(i) for n, i in back.splits.items()} == {"train": 5, "val": 2, "test": 3}
    assert sorted(torch.cat(list(back.splits.values())).tolist()) == list(range(10))
    assert "test_accuracy" in back.describe() and [p.name for p in tmp_path.iterdir()] == ["zoo.safetensors"]


def test_a_truncated_zoo_says_so(tmp_path):
    path = tmp_path / "zoo.safetensors"
    toy_zoo().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ZooError, match="truncated"):
        Zoo.load(path)


def test_parts_of_another_length_are_refused():
    zoo = toy_zoo()
    with pytest.raises(ZooError, match="one per network"):
        Zoo(zoo.weights, zoo.targets[:-1])
    with pytest.raises(ZooError, match="cannot be joined"):
        Zoo.join([zoo, Zoo({}, zoo.targets, zoo.columns)])


# ---------------------------------------------------------------------------------- published files
def keras_rows(count: int) -> np.ndarray:
    """Numbers that say where they are: row * 10000 + column."""
    return (np.arange(count)[:, None] * 10000 + np.arange(4970)).astype(np.float64)


LAYOUT = [
    *(("conv2d/bias:0", 0, 16, "(16,)"), ("conv2d/kernel:0", 16, 160, "(3, 3, 1, 16)")),
    *(("conv2d_1/bias:0", 160, 176, "(16,)"), ("conv2d_1/kernel:0", 176, 2480, "(3, 3, 16, 16)")),
    *(("conv2d_2/bias:0", 2480, 2496, "(16,)"), ("conv2d_2/kernel:0", 2496, 4800, "(3, 3, 16, 16)")),
    *(("dense/bias:0", 4800, 4810, "(10,)"), ("dense/kernel:0", 4810, 4970, "(16, 10)")),
]


def write_published(folder, runs: int, steps=(0, 86)):
    count = runs * len(steps)
    np.save(folder / "weights.npy", keras_rows(count))
    with (folder / "layout.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("varname", "start_idx", "end_idx", "shape"), *LAYOUT])
    with gzip.open(folder / "metrics.csv.gz", "wt", newline="") as file:
        rows = [(("relu", "tanh")[i % 2], step, (i * 37 % 100) / 100) for i in range(runs) for step in steps]
        csv.writer(file).writerows([("config.activation", "step", "test_accuracy"), *rows])


def test_published_kernels_are_read_in_pytorch_order(tmp_path):
    write_published(tmp_path, 4)
    zoo = cnn.load_published(tmp_path)
    w = zoo.weights["conv2.weight"]
    row, o, i, y, x = 2, 5, 7, 1, 2
    assert w[row, o, i, y, x] == (2 * row + 1) * 10000 + 176 + ((y * 3 + x) * 16 + i) * 16 + o  # h, w, in, out
    assert zoo.weights["dense.weight"][row, 3, 11] == (2 * row + 1) * 10000 + 4810 + 11 * 10 + 3
    assert zoo.weights["conv1.bias"][0, 4] == 10000 + 4
    assert {n: x.shape[1:] for n, x in zoo.weights.items()} == {n: p.shape for n, p in cnn.build().named_parameters()}
    # folded as (channel, h, w), the kernel is a row of a matrix per pair of units
    assert torch.equal(w.flatten(3)[row, o, i], w[row, o, i].reshape(9))


def test_published_protocol_filters_then_splits(tmp_path):
    runs, order = 200, np.random.permutation(400)
    write_published(tmp_path, runs)
    (tmp_path / "split.csv").write_text("0\n" + "\n".join(map(str, order)))  # the spurious first line
    zoo = cnn.load_published(tmp_path, "relu", tmp_path / "split.csv")
    assert {n: len(i) for n, i in zoo.splits.items()} == {"train": 40, "val": 10, "test": 50}
    assert set(zoo.columns["config.activation"]) == {"relu"} and set(zoo.columns["step"]) == {86}
    rows = [r for r in order if r % 2 == 1 and (r // 2) % 2 == 0]  # last step, relu, in the order of the file
    assert zoo.weights["conv1.bias"][:, 0].tolist() == [10000 * r for r in rows]
    assert zoo.splits["test"].tolist() == list(range(50, 100))
    (tmp_path / "split.csv").write_text("0\n0\n1\n")
    with pytest.raises(ZooError, match="no order"):
        cnn.load_published(tmp_path, order=tmp_path / "split.csv")


def test_what_is_written_as_published_is_read_back(tmp_path):
    zoo = toy_zoo(10)
    cnn.save_published(zoo, tmp_path)
    assert_same(cnn.load_published(tmp_path), zoo, rtol=0, atol=0)
    assert np.load(tmp_path / "weights.npy").shape == (10, 4970)


@pytest.mark.parametrize("name", ["weights.npy", "metrics.csv.gz"])
def test_truncated_published_files_say_so(tmp_path, name):
    write_published(tmp_path, 20)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ZooError, match="truncated"):
        cnn.load_published(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        cnn.load_published(tmp_path)


def test_published_inrs(tmp_path):
    weights = {n: w.float() for n, w in random_weights(inr.build(), 5).items()}
    zoo = Zoo(weights, torch.tensor([3, 1, 3, 0, 9]), {"image": [0, 1, 44999, 45000, 50000]})
    inr.save_published(zoo, tmp_path)
    (tmp_path / "randinit_smaller_aug1_3s").mkdir()
    torch.save({}, tmp_path / "randinit_smaller_aug1_3s" / "net7.pth")  # a copy: left out
    back = inr.load_published(tmp_path)
    assert_same(back, Zoo(weights, zoo.targets, zoo.columns), rtol=0, atol=0)
    assert {n: i.tolist() for n, i in back.splits.items()} == {"train": [0, 1, 2], "val": [3], "test": [4]}
    assert list(weights)[:2] == ["net.0.linear.weight", "net.0.linear.bias"] and list(weights)[4] == "net.2.weight"
    path = tmp_path / "randinit_smaller_3s" / "net0.pth"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ZooError, match="truncated"):
        inr.load_published(tmp_path)


def test_published_transformers(tmp_path):
    count = 20
    weights = {n: w.float() for n, w in random_weights(transformer.Network(), count).items()}
    assert sum(w[0].numel() for w in weights.values()) == 18506
    columns = {"dataset": ["mnist"] * count, "run": [f"r{i}" for i in range(count)]}
    columns["ckpt_epoch"] = ["75", "best1"] * (count // 2)
    accuracy = torch.arange(count) / 40
    columns["test_top1_accuracy"] = accuracy.tolist()
    transformer.save_published(Zoo(weights, accuracy, columns), tmp_path)
    zoo = transformer.load_published(tmp_path, "mnist", cut_off=0.2)
    assert sorted(zoo.targets.tolist()) == pytest.approx([0.2, 0.25, 0.3, 0.35, 0.4, 0.45])
    assert {n: len(i) for n, i in zoo.splits.items()} == {"train": 4, "val": 0, "test": 2}
    parts = transformer.block_matrices(zoo.weights, 0)
    q = zoo.weights["encoder.0.attention.queries.weight"]
    assert torch.equal(parts["W_q"][:, 1, 5, 3], q[:, 16 + 3, 5])
    o = zoo.weights["encoder.0.attention.out_projection.weight"]
    assert torch.equal(parts["W_o"][:, 1, 3, 5], o[:, 5, 16 + 3])
    with pytest.raises(ZooError, match="no checkpoint"):
        transformer.load_published(tmp_path, "mnist", epoch="100")


# ------------------------------------------------------------------------------- many at once
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_grouped_convolutions_are_the_networks(activation):
    weights = random_weights(cnn.build(), 3)
    assert sum(w[0].numel() for w in weights.values()) == 4970
    x = torch.randn(5, 3, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        own, shared = cnn.forward(weights, x, activation), cnn.forward(weights, x[:, :1], activation)
    for k in range(3):
        one = {n: w[k] for n, w in weights.items()}
        model = cnn.build(activation).double()
        for image, found in ((k, own), (0, shared)):
            expected = functional_call(model, one, (x[:, image : image + 1],))
            torch.testing.assert_close(found[k], expected)


def test_stacked_transformers_are_the_networks():
    model = transformer.Network().double()
    weights, x = random_weights(model, 3), torch.randn(4, 1, 28, 28, dtype=torch.float64)
    found = transformer.forward(weights, transformer.patches_of(x).unsqueeze(0))
    for k in range(3):
        torch.testing.assert_close(found[k], functional_call(model, {n: w[k] for n, w in weights.items()}, (x,)))


def test_stacked_sines_are_the_networks():
    model, points = inr.build().double(), inr.coordinates(5).double()
    weights = random_weights(model, 3)
    found = inr.forward(weights, points)
    for k in range(3):
        torch.testing.assert_close(found[k], functional_call(model, {n: w[k] for n, w in weights.items()}, (points,)))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_keeps_the_mean(dropout):
    """Noise above p keeps all, scaled by 1 / (1 - p) once for each of the three layers; below, nothing is left."""
    weights = {n: w.float() for n, w in random_weights(cnn.build(), 1).items()}
    weights |= {n: torch.zeros_like(w) for n, w in weights.items() if n.endswith("bias")}
    x, p = torch.randn(2, 1, 28, 28), torch.tensor([dropout])
    plain = cnn.forward(weights, x, "relu")
    high = [torch.full((2, 16, s, s), 0.9) for s in (13, 6, 2)]
    torch.testing.assert_close(cnn.forward(weights, x, "relu", high, p), plain / (1 - dropout) ** 3)
    if dropout:
        low = [torch.full((2, 16, s, s), 0.1) for s in (13, 6, 2)]
        assert cnn.forward(weights, x, "relu", low, p).abs().max() == 0


@pytest.mark.parametrize("name", list(training.OPTIMIZERS))
def test_optimizers_are_torchs(name):
    target, start = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    row = {"optimizer": name, "learning_rate": 0.02, "decay": 0.0}
    other = {"optimizer": "sgd", "learning_rate": 0.3, "decay": 0.0}  # a neighbour in the stack changes nothing
    optimizers = training.Optimizers.of([row, other])

    def loss(weights, step):
        return ((weights["w"] - target) ** 4).sum((1, 2)).div(4)

    found = training.train(loss, {"w": start}, optimizers, 20, [20])[20]["w"][0]
    p = start[0].clone().requires_grad_()
    reference = {
        "sgd": lambda: torch.optim.SGD([p], 0.02),
        "momentum": lambda: torch.optim.SGD([p], 0.02, momentum=0.9),
        "adam": lambda: torch.optim.Adam([p], 0.02, eps=training.EPSILON),
        "rmsprop": lambda: torch.optim.RMSprop([p], 0.02, alpha=0.9, eps=training.EPSILON),
    }[name]()
    for _ in range(20):
        reference.zero_grad()
        ((p - target[0]) ** 4).sum().div(4).backward()
        reference.step()
    torch.testing.assert_close(found, p.detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def digits() -> Examples:
    return image_examples(None, 200)


def test_cnns_trained_together_and_alone_are_the_same(digits, monkeypatch):
    monkeypatch.delenv("LEARNED_OPT_DATA", raising=False)
    together = cnn.train_many(TINY, digits, range(5), group=5)
    alone = Zoo.join([cnn.train_many(TINY, digits, [n]) for n in range(5)])
    assert together.columns["step"] == [2, 6] * 5
    assert_same(together, alone, rtol=1e-3, atol=1e-4)
    moved = cnn.train_many(TINY, digits, [5, 6])
    assert not torch.allclose(moved.weights["conv1.weight"][0], together.weights["conv1.weight"][0], atol=1e-2)


def test_transformers_trained_together_and_alone_are_the_same():
    settings = transformer.Settings(examples=200, steps=4, checkpoints=(4,), batch=8)
    found = image_examples(None, 200)
    patches = (transformer.patches_of(found.x), found.y, transformer.patches_of(found.test_x[:50]), found.test_y[:50])
    examples = Examples("digits", *patches, 10)
    together = transformer.train_many(settings, examples, range(4))
    alone = Zoo.join([transformer.train_many(settings, examples, [n]) for n in range(4)])
    for name, w in together.weights.items():
        torch.testing.assert_close(w, alone.weights[name], rtol=1e-2, atol=1e-3)


def test_checkpoints_of_one_transformer_stay_together_when_split():
    zoo = Zoo({"w": torch.zeros(30, 1)}, torch.zeros(30), {"run": [f"r{i % 10}" for i in range(30)]})
    parts = transformer.split_by_run(zoo)
    runs = {name: {zoo.columns["run"][i] for i in index.tolist()} for name, index in parts.splits.items()}
    assert [len(runs[name]) for name in ("train", "val", "test")] == [7, 1, 2]
    assert sum(map(len, runs.values())) == 10 and sum(map(len, parts.splits.values())) == 30


def test_transformers_see_images_of_the_size_of_the_recipe(monkeypatch):
    monkeypatch.delenv("LEARNED_OPT_DATA", raising=False)
    examples = transformer.load_examples(transformer.Settings(size=8, examples=5), None)
    assert examples.x.shape == (5, 4, 16)
    with pytest.raises(ZooError, match="patches"):
        transformer.Settings(size=18)


def test_sines_fit_their_images():
    _, x, y = images(None)
    settings = inr.Settings(steps=100)
    zoo = inr.fit(settings, x, y, range(4))
    assert min(zoo.columns["psnr"]) > 30 and zoo.targets.tolist() == y[:4].tolist()
    alone = inr.fit(settings, x, y, range(2, 3))
    torch.testing.assert_close(
        alone.weights["net.1.linear.weight"][0], zoo.weights["net.1.linear.weight"][2], rtol=0.1, atol=5e-3
    )


# ----------------------------------------------------------------------------- interrupted generation
def test_an_interrupted_generation_goes_on_to_the_same_zoo(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LEARNED_OPT_DATA", raising=False)
    whole = cnn.make(TINY, tmp_path / "whole", 6, chunk=2)
    make, made = cnn.train_many, []

    def interrupted(settings, examples, rows):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(rows)
        return make(settings, examples, rows)

    monkeypatch.setattr(cnn, "train_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cnn.make(TINY, tmp_path / "cut", 6, chunk=2)
    chunks = sorted((tmp_path / "cut" / "chunks").iterdir())
    assert [p.name for p in chunks] == ["000000-000002.safetensors", "000002-000004.safetensors"]
    chunks[0].write_bytes(chunks[0].read_bytes()[:1000])  # and one chunk is cut short later
    made.clear()
    resumed = cnn.make(TINY, tmp_path / "cut", 6, chunk=2)
    assert made == [range(0, 2), range(4, 6)] and "truncated" in capsys.readouterr().out
    assert_same(whole, resumed, rtol=0, atol=0)
    assert_same(cnn.load_published(tmp_path / "cut" / "published"), resumed, rtol=0, atol=0)
    with pytest.raises(ZooError, match="other settings"):
        cnn.make(cnn.Settings(seed=1), tmp_path / "cut", 6, chunk=2)


@pytest.mark.parametrize("settings", [cnn.Settings, transformer.Settings])
def test_the_last_checkpoint_is_the_end_of_the_training(settings):
    assert settings(steps=5, checkpoints=(0, 5)).steps == 5
    for steps, checkpoints in ((100, (60,)), (4, (60,)), (4, (4, 60)), (4, ()), (4, (-1, 4))):
        with pytest.raises(ZooError, match=f"last of {steps} steps"):
            settings(steps=steps, checkpoints=checkpoints)


def test_the_command_line_makes_and_describes(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LEARNED_OPT_DATA", raising=False)
    main(["inr", "--out", str(tmp_path / "inr"), "--count", "12", "--steps", "2", "--published"])
    main(["describe", str(tmp_path / "inr")])
    assert "12 networks of 1185 parameters" in capsys.readouterr().out
    assert (tmp_path / "inr" / "zoo.png").stat().st_size > 1000
    assert len(inr.load_published(tmp_path / "inr" / "published")) == 12
    with pytest.raises(SystemExit, match="no zoo"):
        main(["describe", str(tmp_path)])
    with pytest.raises(SystemExit, match="LEARNED_OPT_DATA"):
        main(["transformer", "--task", "ag_news", "--out", str(tmp_path / "text")])
    with pytest.raises(SystemExit, match="count must be 1 or more, not 0"):
        main(["inr", "--count", "0", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="has no MNIST"):
        main(["inr", "--count", "3", "--out", str(tmp_path / "none"), "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: checkpoints 60, 200, 600"):
        main(["cnn", "--steps", "100", "--out", str(tmp_path / "cnn")])


# ------------------------------------------------------------------------------------- augmentation
@pytest.mark.parametrize("kind", ["relu", "tanh", "sine"])
def test_augmentation_leaves_the_function(kind):
    model = (inr.build() if kind == "sine" else cnn.build(kind)).double()
    x = torch.randn(3, 2, dtype=torch.float64) if kind == "sine" else torch.randn(3, 1, 20, 20, dtype=torch.float64)
    weights = random_weights(model, 4)
    zoo = Zoo(
        weights, torch.arange(4.0), {"n": [0, 1, 2, 3]}, {"train": torch.tensor([0, 2]), "test": torch.tensor([1, 3])}
    )
    symmetry = infer(model)
    moved = augment.augment(zoo, symmetry, high=1e4)
    assert moved.splits["train"].tolist() == [0, 2, 4, 6] and moved.columns["copy"] == [0] * 4 + [1] * 4
    for k in range(4):
        before, after = (functional_call(model, z, (x,)) for z in (moved.state_dict(k), moved.state_dict(k + 4)))
        torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)
        name = list(weights)[2]
        assert not torch.allclose(moved.weights[name][k], moved.weights[name][k + 4])
    elements = augment.sample(symmetry, 4, torch.Generator().manual_seed(0), high=10)
    fast = augment.act(symmetry, elements, weights)
    for k in range(4):  # the slow reference: one network, one element
        one = type(elements)(
            {n: p[k] for n, p in elements.perms.items()}, {n: s[k] for n, s in elements.scales.items()}
        )
        for name, w in symmetry.act(one, zoo.state_dict(k)).items():
            torch.testing.assert_close(fast[name][k], w)


def test_augmentation_of_transformers_mixes_within_heads():
    model, x = transformer.Network(4).double(), torch.randn(3, 1, 12, 12, dtype=torch.float64)
    zoo = Zoo(random_weights(model, 3), torch.arange(3.0))
    spec = zoo_spec(zoo.state_dict(0))
    moved = augment.augment(zoo, spec, high=50.0, copies=2)
    assert len(moved) == 9 and moved.columns["copy"] == [0] * 3 + [1] * 3 + [2] * 3
    name = "encoder.0.attention.queries.weight"
    for k in range(3):
        before = functional_call(model, moved.state_dict(k), (x,))
        for copy in (k + 3, k + 6):
            torch.testing.assert_close(functional_call(model, moved.state_dict(copy), (x,)), before)
            assert (moved.weights[name][copy] - moved.weights[name][k]).abs().max() > 0.1
        # the control: queries without their keys
        wrong = moved.state_dict(k) | {name: moved.weights[name][k + 3]}
        assert (functional_call(model, wrong, (x,)) - before).abs().max() > 1e-4
    product = [moved.weights[name][k].T @ moved.weights[name.replace("queries", "keys")][k] for k in (0, 3)]
    torch.testing.assert_close(product[0], product[1])  # summed over heads: what GL does not change
    with pytest.raises(ValueError, match="1 or more"):
        augment.augment(zoo, spec, high=0.5)


def test_scales_of_augmentation_are_the_published_ones():
    g = torch.Generator().manual_seed(0)

    def factors(activation):
        """Those of the units that conv2 writes."""
        symmetry = infer(cnn.build(activation))
        ((name, _),) = symmetry.specs["conv2.bias"].axes[0].scale
        return augment.sample(symmetry, 500, g, high=100).scales[name]

    relu, tanh = factors("relu"), factors("tanh")
    assert 1 <= relu.min() < 3 and 98 < relu.max() <= 100 and abs(relu.mean() - 50.5) < 2
    assert set(tanh.unique().tolist()) == {-1.0, 1.0}
    with pytest.raises(ValueError, match="1 or more"):
        augment.sample(infer(cnn.build()), 1, g, high=0.5)


def test_the_wrong_symmetry_changes_the_function():
    """The control: what is a symmetry of relu is none of tanh."""
    model, x = cnn.build("tanh").double(), torch.randn(3, 1, 20, 20, dtype=torch.float64)
    weights = random_weights(model, 2)
    symmetry = infer(cnn.build("relu"))
    moved = augment.act(symmetry, augment.sample(symmetry, 2, torch.Generator().manual_seed(0), high=10), weights)
    one, two = (functional_call(model, {n: w[0] for n, w in ws.items()}, (x,)) for ws in (weights, moved))
    assert (one - two).abs().max() > 1e-2


def test_word_vectors_of_words_used_alike_are_alike():
    texts = [[1, 3, 4, 5], [2, 3, 4, 5], [6, 7, 8, 9]] * 20
    vectors = word_vectors(texts, 10, 3, window=2)
    similar = nn.functional.cosine_similarity(vectors[1], vectors[2], dim=0)
    assert similar > 0.99 > 0.5 > nn.functional.cosine_similarity(vectors[1], vectors[6], dim=0)
    assert vectors[0].abs().max() < 1e-6
