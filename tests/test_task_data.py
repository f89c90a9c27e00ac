"""The data of tasks: splits, crops, views, and files in a folder."""

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
from torch.testing import assert_close

from tasks import data, mlp, suites
from tasks.zoo import sources


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def test_handwriting_is_mnist_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("LEARNED_OPT_DATA", raising=False)
    small = data.handwriting(None)
    assert small.canvas.shape == (1500, 1, 30, 30) and small.held_x.shape == (297, 1, 28, 28)
    assert 200 < small.canvas.max() <= 240 and small.canvas.dtype == torch.uint8
    folder = tmp_path / "data"
    x, _ = write_mnist(folder, ".gz")["t10k"]
    assert torch.equal(data.handwriting(folder).held_x, data.images("MNIST", folder).held_x)
    tasks = suites.seen(folder)
    there, here = (make["mlp-handwriting"]() for make in (tasks, suites.seen()))
    assert not torch.equal(there.held_out()[0][:5], here.held_out()[0][:5])


@pytest.mark.parametrize("named", ["option", "environment"])
def test_a_data_folder_without_the_data_is_refused(named, tmp_path, monkeypatch):
    """What stands in for them where no folder is named would go unseen."""
    monkeypatch.setenv("LEARNED_OPT_DATA", str(tmp_path))
    folder = tmp_path if named == "option" else None
    tasks = suites.seen(folder)
    for name, make in tasks.items():
        if suites.source_of(name, folder):
            with pytest.raises(FileNotFoundError, match=r"has no (MNIST|AG News): .*leave the data folder out"):
                make()
    with pytest.raises(FileNotFoundError, match="has no MNIST"):
        sources.images(folder)


def test_sources_are_called_by_what_the_folder_makes_of_them(tmp_path, monkeypatch):
    monkeypatch.delenv("LEARNED_OPT_DATA", raising=False)
    assert {suites.source_of(n) for n in suites.SEEN} == {
        "",
        "scikit-learn's digits, enlarged",
        "Python's help texts",
    }
    assert {suites.source_of(n, tmp_path) for n in suites.SEEN} == {"", "MNIST", "AG News"}


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
