"""The symmetry inferred for many architectures: true, what an expert writes, and not more than that.

Everything is checked on the model itself, independently of the inference's own verification.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from learned_opt import NFNOpt, infer_symmetry
from learned_opt.frame import potentials
from learned_opt.symmetry import Element, Label, Spec, Symmetry, randomised
from learned_opt.symmetry.axes import Axis, Leaf, Prod, Sum, leaves_of
from tests.symmetry.infer.architectures import CASES as FIRST
from tests.symmetry.infer.architectures import Inputs
from tests.symmetry.infer.expert_notation import Table, differences
from tests.symmetry.infer.experts import EXPERTS
from tests.symmetry.infer.more_architectures import MORE

CASES = FIRST | MORE
EXACT = 1e-9  # relative, in float64
CHANGED = 1e-6  # what a transformation outside the group must at least do


class Widened(TorchFunctionMode):
    """Casts to float32 become casts to float64: some models compute their norms in float32 whatever they are in."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if "grouped_mm" in getattr(func, "__name__", ""):  # has no float64
            return grouped_product(*args, **(kwargs or {}))
        func = Tensor.double if func is Tensor.float else func
        widen = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        return func(*map(widen, args), **{n: widen(x) for n, x in (kwargs or {}).items()})


def grouped_product(x: Tensor, w: Tensor, offs: Tensor, **kwargs: Any) -> Tensor:
    runs = x.tensor_split(offs.tolist())
    return torch.cat([run @ m for run, m in zip(runs, w, strict=False)])


def names(pool: Mapping[str, object]) -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.slow) if CASES[n].slow else n for n in CASES if n in pool]


def built(name: str) -> tuple[nn.Module, Inputs]:
    case = CASES[name]
    if case.needs:
        pytest.importorskip(case.needs, exc_type=ModuleNotFoundError)
    torch.manual_seed(0)
    return case.build(), case.inputs()


@cache
def inferred(name: str) -> Symmetry:
    model, inputs = built(name)
    return infer_symmetry(model, *inputs, verify=False)


def change(symmetry: Symmetry, model: nn.Module, inputs: Inputs, samples: int = 3) -> float:
    with Widened():
        return symmetry.check(model, *inputs, samples=samples)


# --------------------------------------------------------------------------------- what is claimed holds
@pytest.mark.parametrize("name", names(CASES))
def test_inferred_symmetry_is_true(name: str) -> None:
    model, inputs = built(name)
    symmetry = inferred(name)
    symmetry.validate(dict(model.named_parameters()))
    assert change(symmetry, model, inputs) < EXACT


@pytest.mark.parametrize("name", names(CASES))
def test_every_operator_is_known_and_parameters_are_covered(name: str) -> None:
    symmetry = inferred(name)
    assert symmetry.notes == ()
    parameters = dict(built(name)[0].named_parameters())
    free = [p.numel() for n, p in parameters.items() if any(map(_moves, _labels(symmetry, n)))]
    assert sum(free) >= CASES[name].covered * sum(p.numel() for p in parameters.values())


def _labels(symmetry: Symmetry, name: str) -> list[Label]:
    leaves = (leaf for axis in symmetry.specs[name].axes for leaf in leaves_of(axis))
    return [symmetry.labels[leaf.label] for leaf in leaves if leaf.label is not None]


def _moves(label: Label) -> bool:
    return label.size > 1 and not label.fixed


@pytest.mark.parametrize("name", ["mlp_bn_train", "cnn_bn_train"])
def test_what_holds_in_training_holds_in_evaluation(name: str) -> None:
    """Running statistics are state: not read in training, but they must move so as to be right afterwards."""
    model, inputs = built(name)
    assert model.training
    assert change(inferred(name), model.eval(), inputs) < EXACT


@pytest.mark.parametrize("name", names(CASES))
def test_the_frame_follows_every_scale(name: str) -> None:
    """What the optimizer makes of the scales: potentials that are multiplied by each unit's own."""
    model, _ = built(name)
    symmetry, g = inferred(name), torch.Generator().manual_seed(0)
    weights = {n: randomised(p.detach().double(), g) for n, p in model.named_parameters()}
    element = Element(symmetry.identity().perms, symmetry.sample(g).scales)
    before, after = potentials(symmetry, weights), potentials(symmetry, symmetry.act(element, weights))
    if before is None or after is None:
        assert all(s.kind == "sign" for s in symmetry.scales.values())
        return
    factors = [torch.ones_like(d) if symmetry.scales[n].kind == "sign" else d.abs() for n, d in element.scales.items()]
    moved = torch.cat([f.flatten() for f in factors]).log()
    torch.testing.assert_close(after[:-1] - before[:-1], moved, rtol=0, atol=1e-8)


def test_modes_of_modules_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()).eval(), nn.Linear(4, 2))
    modes = [m.training for m in model.modules()]
    infer_symmetry(model, torch.randn(2, 3), verify=False)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("how", [{}, {"return_dict": False}, {"use_cache": False}])
@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_language_models_are_inferred_with_their_cache(kind: str, how: dict[str, bool]) -> None:
    """As they are trained: with labels, and a cache among the outputs unless it is refused."""
    transformers = pytest.importorskip("transformers", exc_type=ModuleNotFoundError)
    name = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM"}[kind]
    sizes = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=8)
    tokens = dict(vocab_size=19, bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM")
    config = getattr(transformers, f"{kind}Config")(**sizes, **tokens)
    model, ids = getattr(transformers, name)(config), torch.randint(0, 19, (2, 6))
    optimizer = NFNOpt(model.parameters())
    output = model(input_ids=ids, labels=ids, **how)
    output[0].backward()
    optimizer.step()
    found = optimizer.symmetry
    assert found is not None and len(found.scales) > 2
    assert not [note for note in found.notes if "verified" in note]
    moving = [n for n in found.specs if any(map(_moves, _labels(found, n)))]
    assert set(moving) >= {n for n, p in model.named_parameters() if p.ndim > 1}


# ------------------------------------------------------------------------------------ as an expert writes
@pytest.mark.parametrize("name", names(EXPERTS))
def test_what_the_expert_writes_is_true(name: str) -> None:
    model, inputs = built(name)
    assert change(EXPERTS[name]().symmetry(model), model, inputs) < EXACT


@pytest.mark.parametrize("name", names(EXPERTS))
def test_inferred_is_what_the_expert_writes(name: str) -> None:
    expert = EXPERTS[name]().symmetry(built(name)[0])
    found = differences(inferred(name), expert)
    assert not found, "\n" + "\n".join(found)


# --------------------------------------------------------------------------------------------- controls
SMALL = [n for n in CASES if not CASES[n].slow and n not in ("resnet18", "mobilenet_v2")]


# Biases and running statistics may truly not matter (before a norm, in a key): these are judged on matrices.
@pytest.mark.parametrize("name", SMALL)
def test_moving_one_tensor_alone_changes_the_function(name: str) -> None:
    model, inputs = built(name)
    symmetry = inferred(name)
    matrices = [n for n, p in model.named_parameters() if p.ndim > 1 and any(map(_moves, _labels(symmetry, n)))]
    for tensor in dict.fromkeys((matrices[0], matrices[len(matrices) // 2], matrices[-1])):
        alone = replace(symmetry, specs={tensor: symmetry.specs[tensor]})
        assert change(alone, model, inputs) > CHANGED, f"{tensor} alone"


@pytest.mark.parametrize("name", SMALL)
def test_permuting_a_fixed_axis_changes_the_function(name: str) -> None:
    model, inputs = built(name)
    symmetry = inferred(name)
    loosened = list(_loosened(symmetry, dict(model.named_parameters())))
    assert loosened, "nothing is fixed, not even the output"
    for what, one in loosened[:: max(1, len(loosened) // 6)]:
        assert change(one, model, inputs) > CHANGED, what


def _loosened(symmetry: Symmetry, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Symmetry]]:
    """For each axis of a matrix that is wholly fixed, a permutation of that axis and of nothing else."""
    for name in (n for n, p in parameters.items() if p.ndim > 1):
        for i, axis in enumerate(symmetry.specs[name].axes):
            if isinstance(axis, Leaf) and axis.label is None and not axis.scale and axis.size > 1:
                free = tuple(Leaf(n, "free" if j == i else None) for j, n in enumerate(symmetry.specs[name].shape))
                spec = Spec(free, symmetry.specs[name].roles)
                yield f"{name}, axis {i}", Symmetry({name: spec}, {"free": Label(axis.size)})


# ------------------------------------------------------------------------------------ the comparison itself
@pytest.fixture
def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))


def table(kind: Any = "real", hidden: str = "a", read: str = "b") -> Table:
    t = Table()
    for label in ("a", "b"):
        t.kinds[label] = kind
    t.affine("0", f"{hidden}^{hidden}", ".")
    t.affine("1", "b^b", "a/a")
    t.affine("2", ".", f"{read}/{read}")
    return t


def test_names_do_not_matter(two_layers: nn.Module) -> None:
    other = Table()
    other.kinds |= {"scale of x": "real", "y": "real"}
    other.kinds["x"] = other.kinds.pop("scale of x")
    other.affine("0", "x^x", ".")
    other.affine("1", "y^y", "x/x")
    other.affine("2", ".", "y/y")
    assert differences(other.symmetry(two_layers), table().symmetry(two_layers)) == []


@pytest.mark.parametrize(
    "wrong, said",
    [
        (partial(table, "positive"), "sign scales"),
        (partial(table, "sign"), "positive scales"),
        (partial(table, hidden="b"), "is several"),
        (partial(table, read="a"), "is several"),
    ],
)
def test_each_kind_of_mistake_is_found(two_layers: nn.Module, wrong: Callable[[], Table], said: str) -> None:
    right, other = table().symmetry(two_layers), wrong().symmetry(two_layers)
    for pair in ((right, other), (other, right)):
        assert any(said in line for line in differences(*pair))


def test_another_tree_or_fibre_is_found() -> None:
    model = nn.Linear(3, 24)

    def wide(axis: str, *over: str) -> Symmetry:
        t = Table()
        t.over |= dict.fromkeys(over, ("h",))
        t.affine("", axis, ".")
        t.lines = {n.removeprefix("."): line for n, line in t.lines.items()}
        return t.symmetry(model)

    fibred = wide("h:4*d:6", "d")
    assert differences(fibred, wide("h:4*d:6", "d")) == []
    assert "is over" in differences(fibred, wide("h:4*d:6"))[0]
    assert "inferred [" in differences(fibred, wide("d:6*h:4"))[0]
    assert "inferred [" in differences(fibred, wide("."))[0]


@pytest.mark.parametrize(
    "one, other",
    [
        (Prod((Leaf(2), Leaf(3, "a"))), Sum((Leaf(3, "a"), Leaf(3, "a")))),
        (Prod((Sum((Leaf(3, "a"), Leaf(2))), Leaf(4))), Sum((Prod((Leaf(3, "a"), Leaf(4))), Leaf(8)))),
        (Prod((Leaf(3, "a"), Prod((Leaf(2), Leaf(2))))), Prod((Leaf(3, "a"), Leaf(1), Leaf(4)))),
        (Sum((Leaf(3), Sum((Leaf(2), Leaf(1))))), Leaf(6)),
        (Prod((Leaf(1, "unit"), Leaf(3, "a"))), Leaf(3, "a")),
    ],
)
def test_ways_to_write_one_axis_are_the_same(one: Axis, other: Axis) -> None:
    size = {"a": Label(3), "unit": Label(1)}
    a, b = (Symmetry({"w": Spec((axis,), ("out",))}, size) for axis in (one, other))
    assert differences(a, b) == []
