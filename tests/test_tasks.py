"""One contract for all families and suites; then the data, the initial weights and the errors."""

import ast
import gzip
import math
import struct
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap
from torch.testing import assert_close

import tasks
from tasks import conv, data, mlp, suites, transformer
from tasks.init import Sin, initializers
from tasks.task import Problem, Supervised, TaskError, check_ceiling, check_losses, mean_squared_error

FAMILY_DRAWS = 3
MAKERS = {
    f"train:{name}:{seed}": lambda family=family, seed=seed: family(seeded(seed))
    for name, family in suites.TRAIN.items()
    for seed in range(FAMILY_DRAWS)
}
CONCRETE = suites.VALID | suites.STREAMING | suites.STREAMING_LATER
MAKERS |= {f"concrete:{name}": make for name, make in CONCRETE.items()}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=sorted(MAKERS))
def task(request):
    return MAKERS[request.param]()


def stack(trees):
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def small(batch, n=4):
    return tuple(part[:n] for part in batch)


def double(tree):
    return {name: x.double() for name, x in tree.items()}


def double_batch(batch):
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


# ---------------------------------------------------------------------------------- the contract


def test_initial_weights_have_the_names_and_shapes_of_the_model(task):
    weights = task.init(seeded(0))
    expected = {name: p.shape for name, p in task.model.named_parameters()}
    assert {name: w.shape for name, w in weights.items()} == expected
    assert list(weights) == list(expected)
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values())


def test_the_model_keeps_no_state(task):
    assert not list(task.model.buffers())


def test_everything_random_comes_from_the_generator(task):
    def draw(seed, global_seed):
        torch.manual_seed(global_seed)
        g = seeded(seed)
        return [*task.init(g).values(), *task.batch(g), *task.batches(g, 2)]

    first, again, other = draw(1, 1), draw(1, 2), draw(2, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    matrices = [i for i, a in enumerate(first) if a.ndim > 1]
    assert all(not torch.equal(first[i], other[i]) for i in matrices)


def test_a_task_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for make in MAKERS.values():
        make().init(seeded(0))
    assert torch.equal(before, torch.get_rng_state())


def test_initial_loss_is_on_the_scale_of_the_ceiling(task):
    losses = [float(task.loss(task.init(seeded(s)), task.train_eval())) for s in range(3)]
    assert all(0.7 * task.ceiling < loss < 3 * task.ceiling for loss in losses), losses


def test_every_parameter_has_a_gradient(task):
    """But for the bias of the keys, to which softmax is blind."""
    g = seeded(0)
    gradients = grad(task.loss)(task.init(g), task.batch(g))
    zero = [n for n, x in gradients.items() if not (x.isfinite().all() and x.abs().max() > 1e-7)]
    assert [name for name in zero if not name.endswith("attn.k.bias")] == []


def test_batches_are_n_batches_of_the_same_distribution(task):
    batch, many = task.batch(seeded(0)), task.batches(seeded(1), 5)
    for one, all_of_them in zip(batch, many, strict=True):
        assert all_of_them.shape == (5, *one.shape)
        assert all_of_them.dtype == one.dtype
    assert len(batch[0]) == task.batch_size
    x = task.batches(seeded(2), 1 + 1000 // task.batch_size)[0].flatten(0, 1).float()
    y = task.batches(seeded(3), 1 + 1000 // task.batch_size)[0].flatten(0, 1).float()
    assert abs(x.mean() - y.mean()) < 0.1 * x.std()
    assert not torch.equal(many[0][0], many[0][1])


def test_fixed_batches_are_fixed_and_bounded(task):
    for batch in (task.held_out, task.train_eval):
        assert all(torch.equal(a, b) for a, b in zip(batch(), batch(), strict=True))
        assert 0 < len(batch()[0]) <= 1024
        assert batch()[0].shape[1:] == task.batch(seeded(0))[0].shape[1:]


def test_vmapped_loss_and_gradient_are_those_of_the_loop(task):
    """Over stacked weights and stacked batches, as meta-training runs them."""
    g = seeded(0)
    weights = [task.init(g) for _ in range(2)]
    batches = small(task.batches(g, 2), 2)
    batches = tuple(part[:, :6] for part in batches)
    one = [(w, tuple(part[i] for part in batches)) for i, w in enumerate(weights)]
    assert_close(vmap(task.loss)(stack(weights), batches), torch.stack([task.loss(w, b) for w, b in one]))
    together = vmap(grad(task.loss))(stack(weights), batches)
    apart = stack([grad(task.loss)(w, b) for w, b in one])
    assert_close(together, apart, rtol=1e-3, atol=1e-5)


def test_second_derivatives_are_right(task):
    """grad of |grad|^2 / 2 along a direction is the difference quotient, vmapped too."""
    g = seeded(0)
    weights, batch = double(task.init(g)), double_batch(small(task.batch(g)))
    direction = {n: torch.randn(w.shape, generator=g).double() for n, w in weights.items()}
    norm = sum(x.square().sum() for x in direction.values()).sqrt()
    direction = {n: x / norm for n, x in direction.items()}  # a short step, to cross no kink

    def half_square(w):
        return sum(x.square().sum() for x in grad(task.loss)(w, batch).values()) / 2

    eps = 1e-7
    ahead, behind = (half_square({n: w + sign * eps * direction[n] for n, w in weights.items()}) for sign in (1, -1))
    second = grad(half_square)(weights)
    slope = sum((second[n] * direction[n]).sum() for n in weights)
    assert_close(slope, (ahead - behind) / (2 * eps), rtol=1e-3, atol=1e-5)
    vmapped = vmap(grad(half_square))(stack([weights, weights]))
    assert_close({n: x[1] for n, x in vmapped.items()}, second)


@pytest.mark.parametrize("name", sorted(CONCRETE))
def test_adam_learns_in_thirty_steps(name):
    task = CONCRETE[name]()
    g = seeded(0)
    weights = {n: w.requires_grad_() for n, w in task.init(g).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=3e-3)
    with torch.no_grad():
        before = float(task.loss(weights, task.train_eval()))
    for _ in range(30):
        optimizer.zero_grad()
        task.loss(weights, task.batch(g)).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(task.loss(weights, task.train_eval())) < 0.97 * before


# ------------------------------------------------------------------------------------ the suites


def matrices(task) -> set[tuple[int, ...]]:
    """Shapes of all weights but vectors."""
    return {tuple(p.shape) for p in task.model.parameters() if p.ndim > 1}


def test_no_matrix_of_valid_or_held_out_has_a_shape_that_train_samples():
    g = seeded(0)
    sampled = set().union(*(matrices(f(g)) for f in suites.TRAIN.values() for _ in range(200)))
    assert len(sampled) > 100
    for name, make in (suites.VALID | suites.HELD_OUT).items():
        assert matrices(make()).isdisjoint(sampled), name


def test_suites_have_the_promised_kinds_and_sizes():
    valid = [make() for make in suites.VALID.values()]
    assert len(suites.VALID) >= 9 and len(suites.HELD_OUT) >= 16
    assert not set(suites.VALID) & set(suites.HELD_OUT)
    assert all(400 <= task.steps <= 800 for task in valid)
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Embedding, nn.Tanh, nn.GELU, Sin):
        assert any(isinstance(m, kind) for task in valid for m in task.model.modules()), kind
    assert any(torch.equal(*task.held_out()) for task in valid if task.name.startswith("auto"))
    assert [task.name for task in valid] == list(suites.VALID)
    assert [make().name for make in suites.HELD_OUT.values()] == list(suites.HELD_OUT)


@pytest.mark.parametrize("name", sorted(suites.TRAIN))
@given(seed=st.integers(0, 2**40))
@settings(max_examples=5, deadline=None)
def test_a_family_is_a_function_of_its_generator(name, seed):
    one, two = (suites.TRAIN[name](seeded(seed)) for _ in range(2))
    assert repr(one) == repr(two)
    low, high = (100, 2000) if name.startswith("stream") else (200, 1000)
    assert low <= one.steps <= high
    batch = one.batch(seeded(0))
    assert float(one.loss(one.init(seeded(0)), batch)) == float(two.loss(two.init(seeded(0)), batch))


def test_families_vary():
    g = seeded(0)
    for family in suites.TRAIN.values():
        assert len({repr(family(g)) for _ in range(20)}) == 20


def test_tasks_does_not_know_the_optimizer():
    for file in Path(tasks.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("learned_opt", "meta_train")]


# --------------------------------------------------------------------------------- initial weights


def test_initial_scale_multiplies_the_matrices_alone():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    one = {n: draw(seeded(5)) for n, draw in initializers(model).items()}
    two = {n: draw(seeded(5)) for n, draw in initializers(model, scale=2.0).items()}
    for name in one:
        assert_close(two[name], one[name] * (2.0 if one[name].ndim > 1 else 1.0))


@given(fan_in=st.integers(30, 200), seed=st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_linear_weights_have_the_default_distribution(fan_in, seed):
    draws = initializers(nn.Linear(fan_in, 200))
    for draw, count in ((draws["weight"], 200 * fan_in), (draws["bias"], 200)):
        w = draw(seeded(seed)) * fan_in**0.5  # uniform on [-1, 1]
        assert w.abs().max() <= 1
        assert abs(w.square().mean() - 1 / 3) < 6 * (4 / 45 / count) ** 0.5


def test_sines_keep_the_variance():
    sizes = [256] * 6
    model = mlp.mlp(sizes, "sin")
    g = seeded(0)
    model.load_state_dict({n: draw(g) for n, draw in initializers(model).items()})
    x = torch.randn(500, 256, generator=g)
    hidden = model[:8](x)  # after four sines
    assert 0.4 < hidden.detach().std() < 0.8  # sin of N(0, 1): 0.66; default weights give 0.03


def test_template_is_the_same_each_time():
    one, two = (suites.VALID["char"]().model.state_dict() for _ in range(2))
    assert_close(one, two, rtol=0, atol=0)


# --------------------------------------------------------------------------------------- the data


def test_ceiling_is_the_loss_of_the_best_constant():
    source = data.digits()
    task = mlp.classifier("c", source, [8], "relu", batch_size=8, steps=10)
    zeros = {n: torch.zeros_like(w) for n, w in task.init(seeded(0)).items()}
    assert_close(float(task.loss(zeros, task.held_out())), task.ceiling)
    coder = mlp.autoencoder("a", source, [8], "relu", batch_size=8, steps=10)
    zeros = {n: torch.zeros_like(w) for n, w in coder.init(seeded(0)).items()}
    x, y = coder.train_eval()
    zeros["2.bias"] = y.mean(0)
    assert_close(float(coder.loss(zeros, (x, y))), coder.ceiling)


def rows(x):
    return {tuple(row) for row in x.flatten(1).tolist()}


@pytest.mark.parametrize("name", ["wine", "breast_cancer"])
def test_tabular_splits_are_disjoint_and_standardised(name):
    source = data.tabular(name)
    assert rows(source.x).isdisjoint(rows(source.held_x))
    assert len(source.held_x) >= 30
    assert_close(source.x.mean(0), torch.zeros(source.shape), atol=1e-4, rtol=0)
    assert_close(source.x.std(0), torch.ones(source.shape), atol=1e-4, rtol=0)
    assert set(source.y.tolist()) == set(source.held_y.tolist()) == set(range(source.classes))


def test_digits_are_split_and_standardised():
    source = data.digits(shift=0)
    assert source.canvas.shape == (1500, 1, 8, 8) and source.held_x.shape == (297, 1, 8, 8)
    assert rows(source.canvas).isdisjoint(rows(source.held_x))
    x, y = source.sample(seeded(0), 4000)
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05
    assert x.dtype == torch.float32 and y.dtype == torch.int64


@given(st.integers(0, 2**40), st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_a_shifted_digit_is_a_digit_moved_over_black(seed, shift):
    x, y = data.crop(*_padded(shift), 8, seeded(seed), 3)
    for image, label in zip(x, y, strict=True):
        original = data.digits(shift=0).canvas[label, 0]
        moves = [
            torch.equal(image[0], nn.functional.pad(original, (-c, c, -r, r)))
            for r in range(-shift, shift + 1)
            for c in range(-shift, shift + 1)
        ]
        assert any(moves)


def _padded(shift):
    """Digits with their own index as label."""
    canvas = data.digits(shift=shift).canvas
    return canvas, torch.arange(len(canvas))


@given(rows=st.integers(1, 3), columns=st.integers(1, 5), h=st.integers(9, 30), w=st.integers(50, 90))
@settings(max_examples=20, deadline=None)
def test_regions_are_disjoint_parts_of_the_photographs(rows, columns, h, w):
    pixels = torch.arange(2 * h * w).view(2, 1, h, w)  # every pixel is its own number
    parts = data.split_regions(pixels, rows, columns)
    seen = torch.cat([part.flatten() for part in parts])
    assert len(seen.unique()) == len(seen)
    assert all(len(part) == 2 * rows * columns for part in parts)
    for region in range(2 * rows * columns):
        middle = torch.cat([part[region] for part in parts], dim=-1)[0]
        assert (middle.diff(dim=0) == w).all() and (middle.diff(dim=1) == 1).all()
    assert len(seen) > 0.6 * pixels.numel()


@given(size=st.sampled_from([4, 8, 16]), grid=st.sampled_from([(1, 5), (2, 3)]), seed=st.integers(0))
@settings(max_examples=10, deadline=None)
def test_photograph_patches(size, grid, seed):
    source = data.photos(size, grid)
    x, y = source.sample(seeded(seed % 2**40), 300)
    assert x.shape == (300, 3, size, size) == (300, *source.shape)
    assert source.classes == 2 * grid[0] * grid[1]
    assert y.min() >= 0 and y.max() < source.classes
    assert set(source.held_out()[1].tolist()) == set(range(source.classes))
    assert 0.7 < x.std() < 1.3


def test_text_predicts_the_next_character():
    source = data.text(20)
    for x, y in (source.sample(seeded(0), 50), source.held_out()):
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert x.shape[1:] == source.shape == (20,)
        assert x.min() >= 0 and y.max() < source.classes <= 100
    n = len(source.tokens)
    assert n > 100_000 and len(source.held_tokens) == math.ceil(n / 9)
    assert (source.tokens == source.classes - 1).float().mean() < 0.02  # few unknown characters


@given(st.text())
def test_every_text_can_be_encoded(text):
    tokens = data.encode(text)
    assert len(tokens) == len(text)
    known = [c in data.VOCABULARY for c in text]
    assert all(
        data.VOCABULARY[t] == c if k else t == len(data.VOCABULARY)
        for t, c, k in zip(tokens.tolist(), text, known, strict=True)
    )


def test_patches_are_the_pixels_of_the_image():
    images = data.digits()
    patches = data.Patches(images, 4)
    x, _ = images.held_out()
    p, _ = patches.held_out()
    assert p.shape[1:] == patches.shape == (4, 16)
    assert torch.equal(p[:, 1], x[:, 0, :4, 4:].flatten(1))
    with pytest.raises(ValueError, match="patches of 3"):
        data.Patches(images, 3)


def test_noise_is_of_the_given_size_and_spares_the_held_out_and_the_target():
    clean = data.Reconstruct(data.Flat(data.digits()))
    noisy = data.Noisy(clean, 0.25)
    x, y = noisy.sample(seeded(0), 2000)
    assert abs((x - y).std() - 0.25) < 0.005
    assert torch.equal(y, clean.sample(seeded(0), 2000)[0])
    assert torch.equal(*noisy.held_out())
    with pytest.raises(TypeError, match="mean_squared_error"):
        _ = noisy.classes


# ------------------------------------------------------------------------------- data in a folder


def write_idx(path: Path, array: torch.Tensor) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    raw = header + array.numpy().tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_mnist(folder: Path, suffix: str = "", parts=("t10k",), n: int = 50):
    (folder / "mnist").mkdir(parents=True)
    written = {}
    for seed, part in enumerate(parts):
        g = seeded(seed)
        x = torch.randint(256, (n, 28, 28), generator=g, dtype=torch.uint8)
        y = (torch.arange(n) % 10).to(torch.uint8)
        write_idx(folder / "mnist" / f"{part}-images-idx3-ubyte{suffix}", x)
        write_idx(folder / "mnist" / f"{part}-labels-idx1-ubyte{suffix}", y)
        written[part] = x, y
    return written


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_from_the_test_files_alone_trains_on_nine_tenths(tmp_path, suffix):
    x, y = write_mnist(tmp_path, suffix)["t10k"]
    source = data.images("MNIST", tmp_path, shift=0)
    assert torch.equal(source.canvas[:, 0], x[:45]) and torch.equal(source.held_x[:, 0], x[45:])
    assert torch.equal(source.held_y, y[45:].long())
    assert source.shape == (1, 28, 28) and source.classes == 10


def test_mnist_with_its_training_files(tmp_path):
    written = write_mnist(tmp_path, parts=("t10k", "train"))
    source = data.images("MNIST", tmp_path, shift=2)
    assert torch.equal(source.canvas[:, 0, 2:-2, 2:-2], written["train"][0])
    assert torch.equal(source.held_x[:, 0], written["t10k"][0])


def test_handwriting_is_mnist_where_the_folder_has_it(tmp_path):
    small = data.handwriting(tmp_path)
    assert small.canvas.shape == (1500, 1, 30, 30) and small.held_x.shape == (297, 1, 28, 28)
    assert 200 < small.canvas.max() <= 240 and small.canvas.dtype == torch.uint8
    folder = tmp_path / "data"
    x, _ = write_mnist(folder, ".gz")["t10k"]
    assert torch.equal(data.handwriting(folder).held_x, data.images("MNIST", folder).held_x)
    tasks = suites.held_out(folder)
    there, here = (make["mlp-handwriting"]() for make in (tasks, suites.held_out(tmp_path)))
    assert not torch.equal(there.held_out()[0][:5], here.held_out()[0][:5])


def test_folder_errors_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("LEARNED_OPT_DATA", raising=False)
    assert suites.data_dir() is None
    with pytest.raises(FileNotFoundError, match="LEARNED_OPT_DATA"):
        suites.require_data_dir()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        suites.data_dir(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="CIFAR10"):
        data.images("ImageNet", tmp_path)
    with pytest.raises(ValueError, match="wine"):
        data.tabular("iris")


def test_missing_torchvision_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        data.images("MNIST", tmp_path)


class FakeVision:
    """Has the files only when told to download, as torchvision does."""

    def __init__(self, root, train, download):
        if not download:
            raise RuntimeError("Dataset not found.")
        n = 12 if train else 5
        self.data = torch.arange(n * 32 * 32 * 3).remainder(256).view(n, 32, 32, 3).byte().numpy()
        self.targets = [i % 10 for i in range(n)]


def test_torchvision_downloads_on_request_only(tmp_path, monkeypatch):
    fake = types.ModuleType("torchvision")
    fake.datasets = types.SimpleNamespace(CIFAR10=FakeVision)
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    with pytest.raises(FileNotFoundError, match="download=True"):
        data.images("CIFAR10", tmp_path)
    source = data.images("CIFAR10", tmp_path, download=True)
    assert source.shape == (3, 32, 32)
    assert len(source.canvas) == 12 and len(source.held_x) == 5
    assert source.held_x[0, :, 0, 0].tolist() == [0, 1, 2]  # channels first


@pytest.mark.parametrize("raw", [b"", b"\0\0", b"\x1f\x8b\0\0", b"\0\0\x0d\1\0\0\0\1\0", b"\0\0\x08\3"])
def test_a_file_that_is_no_idx_is_named(tmp_path, raw):
    (tmp_path / "labels").write_bytes(raw)
    with pytest.raises(ValueError, match="labels is not an IDX file"):
        data.read_idx(tmp_path / "labels")


def test_a_truncated_idx_is_named(tmp_path):
    write_idx(tmp_path / "x", torch.zeros(3, 4, dtype=torch.uint8))
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(ValueError, match="11 bytes"):
        data.read_idx(tmp_path / "x")


# --------------------------------------------------------------------------------------- the models


def test_attention_is_the_same_fused_and_separate_and_as_torch_computes_it():
    g = seeded(0)
    fused = transformer.Attention(12, 3, causal=True, fused=True)
    apart = transformer.Attention(12, 3, causal=True, fused=False)
    for i, name in enumerate("qkv"):
        linear = getattr(apart, name)
        linear.weight.data = fused.qkv.weight.data[12 * i : 12 * (i + 1)]
        linear.bias.data = fused.qkv.bias.data[12 * i : 12 * (i + 1)]
    apart.proj.load_state_dict(fused.proj.state_dict())
    x = torch.randn(2, 5, 12, generator=g)
    reference = nn.MultiheadAttention(12, 3, batch_first=True)
    reference.in_proj_weight.data, reference.in_proj_bias.data = fused.qkv.weight, fused.qkv.bias
    reference.out_proj.load_state_dict(fused.proj.state_dict())
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    assert_close(apart(x), fused(x))
    assert_close(reference(x, x, x, attn_mask=mask)[0], fused(x))


def test_the_language_model_does_not_look_ahead():
    task = suites.VALID["char"]()
    x, _ = task.batch(seeded(0))
    changed = x.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 97
    before, after = task.model(x), task.model(changed)
    assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 1e-3


@given(
    size=st.sampled_from([8, 12]),
    channels=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    norm=st.booleans(),
    pool=st.sampled_from(["max", "avg"]),
    head=st.sampled_from(["flatten", "average"]),
)
@settings(max_examples=20, deadline=None)
def test_cnn_shapes(size, channels, norm, pool, head):
    model = conv.cnn((2, size, size), channels, 7, "tanh", norm=norm, pool=pool, head=head)
    assert model(torch.randn(3, 2, size, size)).shape == (3, 7)
    assert type(model) is nn.Sequential


def test_model_errors():
    with pytest.raises(ValueError, match="multiple of 3 heads"):
        transformer.Attention(16, 3, causal=False, fused=True)
    with pytest.raises(ValueError, match="flatten"):
        conv.cnn((1, 8, 8), [4], 10, "relu", head="mean")


def test_a_task_is_a_model_data_and_a_loss():
    """The concrete task needs nothing of the families: linear regression, solved."""
    x = torch.randn(64, 3, generator=seeded(0))
    source = data.Rows(x, x @ torch.tensor([[1.0], [2.0], [3.0]]), x[:4], x[:4, :1], 0)
    task = Supervised("linear", lambda: nn.Linear(3, 1), source, batch_size=8, steps=1, loss=mean_squared_error)
    weights = {"weight": torch.tensor([[1.0, 2.0, 3.0]]), "bias": torch.zeros(1)}
    assert float(task.loss(weights, task.batch(seeded(1)))) < 1e-10


def problem(**options):
    settings = {"sample": lambda generator, count: (torch.rand(count, 2, generator=generator),), **options}

    def loss(model, x):
        return model(x).square().mean()

    return Problem("mine", lambda: nn.Linear(2, 1), loss=loss, batch_size=3, steps=5, **settings)


@pytest.mark.parametrize("wrong", [{"x": torch.ones(2, 2)}, torch.ones(2, 2), (), [3.0]])
def test_examples_that_are_no_tensors_are_refused(wrong):
    task = problem(sample=lambda generator, count: wrong)
    for draw in (task.train_eval, task.held_out, lambda: task.batch(seeded(0)), lambda: task.batches(seeded(0), 2)):
        with pytest.raises(TaskError, match="task 'mine': sample must return a tuple of tensors"):
            draw()
    with pytest.raises(TaskError, match="held_out must return"):
        problem(held_out=lambda: wrong).held_out()


def test_a_list_of_tensors_will_do():
    task = problem(sample=lambda generator, count: [torch.rand(count, 2, generator=generator)])
    assert task.batch(seeded(0))[0].shape == (3, 2) and task.batches(seeded(0), 4)[0].shape == (4, 3, 2)


def test_losses_and_ceilings_below_zero_are_refused():
    check_ceiling(problem(ceiling=2.0))
    for ceiling in (0.0, -2.0, math.nan, math.inf):
        with pytest.raises(TaskError, match="task 'mine': its ceiling"):
            check_ceiling(problem(ceiling=ceiling))
    check_losses(problem(ceiling=2.0), torch.tensor([0.0, 3.0, -1e-7, math.nan, math.inf, -math.inf]))
    with pytest.raises(TaskError, match="task 'mine' has a loss of -0.25"):
        check_losses(problem(ceiling=2.0), torch.tensor([[math.nan, 3.0], [-0.25, 0.0]]))
