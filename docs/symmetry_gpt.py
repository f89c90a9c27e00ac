"""The transformer of docs/symmetry.md, and its picture: ``python docs/symmetry_gpt.py``."""

from pathlib import Path

import torch
from torch import Tensor, nn

from learned_opt import infer_symmetry
from tasks.transformer import Transformer


def gpt() -> tuple[Transformer, Tensor]:
    """A language model of two blocks, and token ids ``[2, 16]``."""
    model = Transformer(nn.Embedding(65, 32), 16, 65, width=32, heads=4, depth=2, hidden=128, causal=True)
    return model, torch.arange(32).reshape(2, 16)


if __name__ == "__main__":
    symmetry = infer_symmetry(*gpt())
    print(symmetry)
    symmetry.draw(Path(__file__).resolve().parent / "symmetry_gpt.svg")
