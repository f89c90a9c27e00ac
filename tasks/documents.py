"""Texts as words: AG News where the data folder has it, else Python's own help texts.

A `Corpus` is a list of documents with labels, the held-out ones last; the functions turn it into what a task draws
from: windows of words, bags of words, or the first words of every document.
"""

import csv
import functools
import pydoc_data.topics
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional

from tasks.data import Batch, Rows, Windows

NEWS = Path("ag_news", "test.csv")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as lower-case words, their classes, and how many of them (the first ones) are for training."""

    documents: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...]
    train: int


@functools.cache
def corpus(folder: Path | None) -> Corpus:
    """AG News of the folder (its test rows: 6,800 to train, 800 held out, 4 classes), without one paragraphs of help
    texts.

    The help texts are labelled by the quarter of the alphabet that their topic is in (of the list of topics); every
    ninth of their paragraphs is held out.

    Raises:
        FileNotFoundError: the folder has no AG News.
        ValueError: a row of the file has not the three entries class, title and description.
    """
    if folder is None:
        return _help()
    if not (folder / NEWS).is_file():
        raise FileNotFoundError(
            f"the data folder {folder} has no AG News: {NEWS}. Put it there, or leave the data folder out (--data, "
            "LEARNED_OPT_DATA): then Python's own help texts are used."
        )
    with (folder / NEWS).open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or any(len(row) != 3 for row in rows):
        raise ValueError(f"{folder / NEWS} has a row without class, title and description. Fetch it again.")
    documents = tuple(words(f"{title} {text}") for _, title, text in rows)
    return Corpus(documents, tuple(int(row[0]) - 1 for row in rows), len(rows) * 6800 // 7600)


def _help() -> Corpus:
    topics = pydoc_data.topics.topics
    found = []
    for place, name in enumerate(sorted(topics)):
        paragraphs = (words(p) for p in topics[name].split("\n\n"))
        found += [(p, 4 * place // len(topics)) for p in paragraphs if len(p) >= 8]
    held = found[::9]
    train = [one for k, one in enumerate(found) if k % 9]
    documents, labels = zip(*train, *held, strict=True)
    return Corpus(documents, labels, len(train))


def words(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers, without punctuation."""
    return tuple(re.findall(r"[a-z0-9']+", text.lower()))


def vocabulary(documents: Sequence[Sequence[str]], size: int, skip: int = 0) -> dict[str, int]:
    """The `size` most frequent words after the first `skip`, numbered from 0; ties in alphabetical order."""
    counts = Counter(word for document in documents for word in document)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: i for i, word in enumerate(ranked[skip : skip + size])}


def word_windows(texts: Corpus, length: int, size: int) -> Windows:
    """Windows of the documents one after the other; token `size` is any word but the `size` most frequent ones."""
    index = vocabulary(texts.documents[: texts.train], size)

    def tokens(documents: Sequence[Sequence[str]]) -> Tensor:
        return torch.tensor([index.get(word, size) for document in documents for word in document])

    return Windows(tokens(texts.documents[: texts.train]), tokens(texts.documents[texts.train :]), size + 1, length)


def bags(texts: Corpus, size: int, skip: int) -> Rows:
    """How often each word of the vocabulary occurs in a document, float32 [n, size]; y is the class.

    The `skip` most frequent words say nothing about the topic and are left out, as are documents without 5 words.
    """
    index = vocabulary(texts.documents[: texts.train], size, skip)
    numbers = [[index[word] for word in document if word in index] for document in texts.documents]
    kept = [i for i, row in enumerate(numbers) if len(row) >= 5]
    x = torch.stack([torch.bincount(torch.tensor(numbers[i]), minlength=size) for i in kept]).float()
    return _rows(x, torch.tensor([texts.labels[i] for i in kept]), sum(i < texts.train for i in kept))


def openings(texts: Corpus, length: int, size: int) -> Rows:
    """The first `length` words of every document, int64 [n, length]; token 0 pads, 1 is any unknown word."""
    index = vocabulary(texts.documents[: texts.train], size)
    numbers = [[2 + index.get(word, -1) for word in document[:length]] for document in texts.documents]
    x = torch.stack([functional.pad(torch.tensor(row), (0, length - len(row))) for row in numbers])
    return _rows(x, torch.tensor(texts.labels), texts.train)


def _rows(x: Tensor, y: Tensor, train: int) -> Rows:
    return Rows(x[:train], y[:train], x[train:], y[train:], int(y.max()) + 1)


@dataclass(frozen=True, eq=False)
class Contaminated:
    """Training openings of which each word is, with probability `rate`, another one of the vocabulary."""

    data: Rows
    words: int
    rate: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def classes(self) -> int:
        return self.data.classes

    def sample(self, generator: Generator, count: int) -> Batch:
        x, y = self.data.sample(generator, count)
        hit = torch.rand(x.shape, generator=generator) < self.rate
        other = torch.randint(2, self.words, x.shape, generator=generator)
        return torch.where(hit & (x > 0), other, x), y

    def held_out(self) -> Batch:
        return self.data.held_out()
