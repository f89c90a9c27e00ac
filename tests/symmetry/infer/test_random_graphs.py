"""Inference is sound: on traps that once fooled it, and on random graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from learned_opt import NFNOpt, Symmetry, infer_symmetry
from learned_opt.symmetry.infer import InferenceError
from learned_opt.symmetry.infer.network import Network, export
from learned_opt.symmetry.infer.verify import Check
from tests.symmetry.infer.graphs import FUNCTIONS, JOINS, LAYERS, RandomNet

EXACT = 1e-9


class Between(nn.Module):
    """A function of 12 hidden units between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 12), nn.Linear(12, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def error(model: nn.Module, symmetry: Symmetry, *inputs: Tensor) -> float:
    check = Check(Network(model, export(model, inputs, {})))
    return check.sampled(symmetry, 4) if check.possible else 0.0


def free(symmetry: Symmetry) -> list[str]:
    return [n for n, g in symmetry.labels.items() if not g.fixed]


def heads(h: Tensor) -> Tensor:
    return h.view(-1, 4, 3)


TRAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "a clamp from below is not odd": lambda h: torch.clamp(h, min=-1.0),
    "std is of degree 1 and not even in each entry": lambda h: h * h.std(-1, keepdim=True),
    "a norm of order 0 does not scale": lambda h: h.relu() * torch.linalg.vector_norm(h, 0, -1, keepdim=True),
    "a choice between numbers": lambda h: h * torch.where(h > 0, 1.0, 0.1),
    "statistics of a batch norm lack the other axes": lambda h: F.batch_norm(
        h.view(-1, 3, 4).transpose(1, 2), None, None, training=True
    ).flatten(1),
    "x x^T": lambda h: (heads(h) @ heads(h).mT @ heads(h)).flatten(1),
    "attention without projections": lambda h: F.scaled_dot_product_attention(*(heads(h),) * 3).flatten(1),
    "every head times every head": lambda h: (heads(h)[:, :, None] * heads(h)[:, None]).tanh().sum(1).flatten(1),
    "group norm": lambda h: F.group_norm(h, 4),
    "softmax over heads": lambda h: heads(h).softmax(1).flatten(1),
    "maximum over heads": lambda h: (heads(h) - heads(h).amax(1, keepdim=True)).flatten(1),
    "cosine of nothing is one": lambda h: h + torch.cos(h * 0.0).mean(-1, keepdim=True),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str) -> None:
    model, x = Between(TRAPS[name]), torch.randn(3, 4)
    symmetry = infer_symmetry(model, x, verify=False)
    assert error(model, symmetry, x) <= EXACT
    assert free(symmetry)


@pytest.mark.parametrize("unstacked", [lambda z: z.permute(2, 0, 1, 3), lambda z: z.movedim(2, 0)])
def test_a_stack_moved_to_the_front(unstacked: Callable[[Tensor], Tensor]) -> None:
    def attention(h: Tensor) -> Tensor:
        q, k, v = unstacked(h.view(1, -1, 3, 4))
        return F.scaled_dot_product_attention(q, k, v).repeat(1, 1, 3).flatten(0, 1)

    symmetry = infer_symmetry(Between(attention), torch.randn(3, 4))
    assert sorted(s.kind for s in symmetry.scales.values()) == ["real", "real"] and symmetry.notes == ()


Steps = list[tuple[str, int, int]]
FOUND: dict[str, Steps] = {  # by longer searches, made small by hand
    "heads beside heads in a contraction": [
        *(("across heads", 0, 0), ("addmm", 0, 0), ("log of sum", 0, 0), ("lead", 0, 3)),
    ],
    "axes that fit but for a factor of 1": [("transposed conv", 0, 0), ("select head", 0, 0)],
    "a form with a coefficient of zero": [("weight norm", 0, 0), ("one above the other", 0, 0)],
    "a buffer that is written, in decomposed form": [("written", 0, 0), ("gather", 0, 0), ("rms norm", 1, 0)],
    "a recurrent layer whose hidden units are its inputs'": [("rnn", 0, 0), ("mul", 0, 1)],
    "a tile of fewer dimensions": [("tile", 0, 0)],
}
STEP = st.tuples(st.sampled_from([*FUNCTIONS, *JOINS, *LAYERS, "output"]), st.integers(0, 1), st.integers(0, 3))


@pytest.mark.parametrize("name", FOUND)
def test_graphs_that_once_fooled_it(name: str) -> None:
    assert random_graph_error(FOUND[name]) <= EXACT


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(STEP, min_size=1, max_size=4))
def test_random_graphs(steps: Steps) -> None:
    assert random_graph_error(steps) <= EXACT


def random_graph_error(steps: Steps) -> float:
    torch.manual_seed(0)
    model, x = RandomNet(steps), torch.randn(3, 4)
    return error(model, infer_symmetry(model, x, verify=False), x)


def test_unknown_operator_is_fixed_and_named() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), Between(torch.special.airy_ai))
    model[2].first = nn.Linear(5, 12)
    symmetry = infer_symmetry(model, torch.randn(2, 4), verify=False)
    assert "airy_ai" in symmetry.notes[0]
    assert free(symmetry) == ["0"]


def test_wrong_inputs_and_settings() -> None:
    model = Between(torch.relu)
    with pytest.raises(InferenceError, match=r"by\s+hand"):
        infer_symmetry(model, torch.randn(2, 7))
    with pytest.raises(InferenceError, match="control flow"):
        infer_symmetry(Between(lambda h: h if h.sum() > 0 else -h), torch.randn(2, 4))
    wrong: dict[str, Any] = {"outputs": torch.randn(2, 3)}
    with pytest.raises(ValueError, match="keywords={'outputs'"):
        infer_symmetry(model, torch.randn(2, 4), **wrong)
    wrong = {"verify": "sometimes"}
    with pytest.raises(ValueError, match="sometimes"):
        infer_symmetry(model, torch.randn(2, 4), **wrong)


def test_inputs_may_be_called_as_arguments_of_the_inference() -> None:
    class Named(Between):
        def forward(self, model: Tensor, *, outputs: Tensor, verify: Tensor, mask: Tensor) -> Tensor:
            return super().forward(model * mask) * outputs + verify

    inputs = {"outputs": torch.randn(2, 3), "verify": torch.randn(2, 3)}
    model, x = Named(torch.tanh), torch.randn(2, 4)
    symmetry = infer_symmetry(model, model=x, mask=torch.ones(2, 4), keywords=inputs)
    assert free(symmetry) == free(infer_symmetry(model, x, mask=x, keywords=inputs)) == ["first"]
    optimizer = NFNOpt(model.parameters())
    model(x, mask=x, **inputs).sum().backward()
    optimizer.step()
    assert optimizer.symmetry is not None and free(optimizer.symmetry) == ["first"]
