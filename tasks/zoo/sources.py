"""What the networks of a zoo are trained on: images as tensors in [-1, 1], texts as token sequences."""

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tasks import data, suites

DIGITS_SIZE = 16  # scikit-learn's digits are 8 x 8: too small for three convolutions of stride 2


@dataclass(frozen=True, eq=False)
class Examples:
    """x [n, ...], y [n] int64 to train on, and as many again to test on, which are others."""

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def images(folder: Path | str | None = None) -> tuple[str, Tensor, Tensor]:
    """Name, images [n, 1, size, size] float32 in [-1, 1] and labels [n]: MNIST of the data folder, without one digits.

    MNIST is what the folder's IDX files hold, training images first (28 x 28). The digits are scikit-learn's 1,797,
    enlarged to 16 x 16 by bilinear interpolation.

    Raises:
        FileNotFoundError: there is a data folder, but no MNIST in it.
    """
    found = suites.data_dir(folder)
    if found is not None:
        data.require_idx("MNIST", found)
        source, name, white = data.images("MNIST", found, shift=0), "mnist", 255.0
    else:
        source, name, white = data.digits(shift=0), "digits", 16.0
    x, y = torch.cat([source.canvas, source.held_x]).float(), torch.cat([source.y, source.held_y])
    if x.shape[-1] < DIGITS_SIZE:
        x = functional.interpolate(x, (DIGITS_SIZE, DIGITS_SIZE), mode="bilinear")
    return name, x * (2 / white) - 1, y


def image_examples(folder: Path | str | None, train: int) -> Examples:
    """The first `train` images to train on (at most three quarters of all), all others to test on."""
    name, x, y = images(folder)
    train = min(train, len(x) * 3 // 4)
    return Examples(name, x[:train], y[:train], x[train:], y[train:], 10)


# ------------------------------------------------------------------------------------------- text
@dataclass(frozen=True, eq=False)
class Texts(Examples):
    """Token indices x [n, length], 0 pads; `embedding` [vocabulary, width] is frozen, its row 0 is zero."""

    embedding: Tensor


def ag_news_file(folder: Path | str | None) -> Path:
    """The file of AG News in the data folder.

    Raises:
        FileNotFoundError: no data folder, or no ag_news/test.csv in it.
    """
    path = suites.require_data_dir(folder) / "ag_news" / "test.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Text needs AG News there; the task mnist runs without.")
    return path


def ag_news(folder: Path | str | None, train: int, length: int, width: int = 32, window: int = 4) -> Texts:
    """AG News (4 classes): lower-case words of title and description, the first `length` of each text.

    The folder has only the 7,600 test rows: the first `train` of the file (at most 6,800) are to train on, all others
    to test on. The zoo of the paper embeds words by word2vec reduced to 32 dimensions, which is not free of downloads:
    here word vectors are a truncated SVD of the positive pointwise mutual information of words at most `window` apart
    (Levy & Goldberg 2014, "Neural Word Embedding as Implicit Matrix Factorization"), counted on the training rows
    alone, scaled to mean square 1. Words seen fewer than 3 times have no vector.

    Raises:
        FileNotFoundError: no data folder, or no ag_news/test.csv in it.
        ValueError: a row has not three entries.
    """
    path = ag_news_file(folder)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or any(len(row) != 3 for row in rows):
        raise ValueError(f"{path} has a row without class, title and description. Fetch it again.")
    train = min(train, len(rows) * 6800 // 7600)
    words = [re.findall(r"[a-z0-9']+", f"{title} {text}".lower()) for _, title, text in rows]
    counts = Counter(w for text in words[:train] for w in text)
    known = sorted((w for w, n in counts.items() if n >= 3), key=lambda w: (-counts[w], w))
    index = {w: i for i, w in enumerate(known, start=1)}
    tokens = [[index[w] for w in text if w in index][:length] for text in words]
    x = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, text in zip(x, tokens, strict=True):
        row[: len(text)] = torch.tensor(text, dtype=torch.int64)
    y = torch.tensor([int(row[0]) - 1 for row in rows])
    embedding = word_vectors(
        [[index[w] for w in t if w in index] for t in words[:train]], len(index) + 1, width, window
    )
    return Texts("ag_news", x[:train], y[:train], x[train:], y[train:], 4, embedding)


def word_vectors(texts: list[list[int]], vocabulary: int, width: int, window: int) -> Tensor:
    """float32 [vocabulary, width]: U sqrt(S) of the positive PMI matrix of co-occurrence; row 0 is zero."""
    from scipy import sparse
    from sklearn.utils.extmath import randomized_svd

    first = np.concatenate([np.array(t[:-d]) for t in texts for d in range(1, window + 1) if len(t) > d])
    second = np.concatenate([np.array(t[d:]) for t in texts for d in range(1, window + 1) if len(t) > d])
    pairs = (np.ones(2 * len(first)), (np.concatenate([first, second]), np.concatenate([second, first])))
    count = sparse.coo_matrix(pairs, (vocabulary, vocabulary)).tocsr().tocoo()
    total = np.asarray(count.sum(1)).ravel()
    pmi = np.log(count.data * total.sum() / (total[count.row] * total[count.col]))
    positive = sparse.csr_matrix((np.maximum(pmi, 0), (count.row, count.col)), count.shape)
    u, s, _ = randomized_svd(positive, width, random_state=0)
    vectors = torch.tensor(u * np.sqrt(s), dtype=torch.float32)
    return vectors / vectors[1:].square().mean().sqrt()
