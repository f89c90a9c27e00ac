"""The table and the numbers of a symmetry."""

import itertools
import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from learned_opt import Symmetry, independent
from learned_opt.symmetry import Label, Scale, Spec
from learned_opt.symmetry.axes import Leaf, Prod, Sum
from learned_opt.symmetry.table import one_line
from tasks.transformer import Transformer
from tests.inferred import infer


def gpt(depth: int) -> Transformer:
    return Transformer(nn.Embedding(11, 12), 5, 11, width=12, heads=3, depth=depth, hidden=10, causal=True)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


# ------------------------------------------------------------------------------------------ the table
def sections(symmetry: Symmetry) -> list[list[str]]:
    return [part.splitlines() for part in str(symmetry).split("\n\n")]


def expanded(text: str) -> list[str]:
    """``a.{0..2,4}.{weight,bias}`` -> every name it stands for."""
    choices = []
    for part in re.split(r"(\{[^}]*\})", text):
        if not part.startswith("{"):
            choices.append([part])
            continue
        options: list[str] = []
        for option in part[1:-1].split(","):
            first, dots, last = option.partition("..")
            options += [str(i) for i in range(int(first), int(last) + 1)] if dots else [option]
        choices.append(options)
    return ["".join(c) for c in itertools.product(*choices)]


def names_in(table: list[str]) -> list[str]:
    """Every tensor that a table shows, with repeated modules spelt out."""
    found, heads = [], [""]
    for line in table[1:]:
        depth = (len(line) - len(line.lstrip())) // 2
        word, *rest = line.split(maxsplit=1)
        heads[depth + 1 :] = [heads[depth] + word]
        if rest:
            found += expanded(heads[depth] + word)
    return found


def test_a_table_spelt_out_by_hand() -> None:
    tensors, labels, legend, summary = sections(infer(mlp()))
    assert tensors == [
        "tensor    shape  axes",
        "0.weight  6 x 4  [0:6+, 4]",
        "0.bias    6      [0:6+]",
        "2.weight  5 x 6  [2:5+, 0:6-]",
        "2.bias    5      [2:5+]",
        "4.weight  3 x 5  [3, 2:5-]",
        "4.bias    3      [3]",
    ]
    assert labels == [
        "label  size  over  units    scales    tensors",
        "0      6           permute  positive  3",
        "2      5           permute  sign      3",
    ]
    assert summary == [one_line(infer(mlp()))]
    assert len(legend) == 2


def test_blocks_are_shown_once_with_the_names_of_their_own_labels() -> None:
    tensors, labels, _, _ = sections(infer(gpt(12)))
    heads, qk, vo = "attn.qkv/0", "attn.qkv/1", "attn.qkv/5"
    qkv = f"({heads}:3 * {qk}:4+ | {heads}:3 * {qk}:4- | {heads}:3 * {vo}:4+)"
    assert [" ".join(line.split()) for line in tensors[3:7]] == [
        "blocks.{0..11}.",
        "ln1.{weight,bias} 12 [pos:12 ln1+]",
        f"attn.qkv.weight 36 x 12 [{qkv}, pos:12 ln1-]",
        f"attn.qkv.bias 36 [{qkv}]",
    ]
    assert [line.split() for line in labels[1:]] == [
        ["pos", "12", "permute", "real", "x", "25", "125"],  # 2 + 12 * 10 + 3 (head.bias is fixed)
        ["blocks.{0..11}."],
        [heads, "3", "permute", "3"],
        [qk, "4", heads, "permute", "real", "2"],
        [vo, "4", heads, "permute", "real", "3"],
        ["fc1", "10", "permute", "3"],
    ]


def test_a_deep_model_is_short_and_complete() -> None:
    symmetry = infer(gpt(48))
    assert len(str(symmetry).splitlines()) < 60
    assert sorted(names_in(sections(symmetry)[0])) == sorted(symmetry.specs)


def test_blocks_of_another_structure_are_not_folded() -> None:
    model = gpt(4)
    model.blocks[2] = type(model.blocks[2])(12, 3, 7, "gelu", causal=True, fused=True)
    table = sections(infer(model))[0]
    assert [line for line in table if line.startswith("blocks.{")] == ["blocks.{0,1,3}."]
    assert any(line.split()[:4] == ["blocks.2.fc1.weight", "7", "x", "12"] for line in table)


def hidden(names: list[str], *, shared: str | None = None) -> Symmetry:
    """Blocks ``h.i`` that write and read units of their own, or of the label ``shared``."""
    specs, labels = {}, {}
    for i, name in enumerate(names):
        units = Leaf(4, shared or name)
        labels[units.label] = Label(4)
        specs |= {f"h.{i}.up": Spec((units, Leaf(2)), ("out", "in")), f"h.{i}.bias": Spec((units,), ("out",))}
        specs |= {f"h.{i}.down": Spec((Leaf(2), units), ("out", "in"))}
    return Symmetry(specs, labels)


def test_labels_of_any_name_fold_and_a_label_of_one_neighbour_does_not() -> None:
    assert "[P7:4, 2]" in str(hidden(["P7", "P8", "P9"])) and "h.{0..2}." in str(hidden(["P7", "P8", "P9"]))
    assert "h.{0..2}." in str(hidden(["a", "b", "c"], shared="u"))
    chained = hidden(["a", "b", "c"])
    specs = {**chained.specs, "h.1.down": Spec((Leaf(2), Leaf(4, "a")), ("out", "in"))}
    assert not re.search(r"h\.\{[^}]*1", str(Symmetry(specs, chained.labels)))


def test_a_name_that_two_labels_would_share_is_shown_in_full() -> None:
    symmetry = hidden(["h.0.u", "h.1.u"])
    both = {n: Spec((*s.axes, Leaf(3, "u")), (*s.roles, "in")) for n, s in symmetry.specs.items()}
    shown = str(Symmetry(both, {**symmetry.labels, "u": Label(3)}))
    assert "[h.0.u:4, 2, u:3]" in shown and "[u:4, 2]" in str(symmetry)


def test_composite_axes_fixed_labels_powers_and_notes() -> None:
    labels = {"h": Label(2, fixed=True), "d": Label(3, ("h",))}
    scales = {"a": Scale("sign", 3, "d"), "b": Scale("real", 3, "d"), "r": Scale("positive", 5)}
    inner = Sum((Leaf(3, "d", (("a", 1),)), Leaf(3, "d", (("b", -2),)), Leaf(1)))
    specs = {
        "w": Spec((Prod((Leaf(2, "h"), inner)), Leaf(5, None, (("r", -1),))), ("out", "in")),
        "v": Spec((Sum((Prod((Leaf(2, "h"), Leaf(3, "d"))), Leaf(4))),), ("out",)),
    }
    symmetry = Symmetry(specs, labels, scales, ("unknown operator: grouped_mm",))
    tensors, table, _, notes, summary = sections(symmetry)
    assert tensors[1].endswith("[(h:2 * (d:3 a+ | d:3 b^-2 | 1)), 5 r-]")
    assert tensors[2].endswith("[(h:2 * d:3 | 4)]")
    assert [line.split() for line in table[1:]] == [
        ["h", "2", "fixed", "2"],
        ["d", "3", "h", "permute", "sign,", "real", "2"],
        ["r", "5", "fixed", "positive", "1"],
    ]
    assert notes == ["note: unknown operator: grouped_mm"] and summary[0].endswith("; 1 note")
    assert repr(symmetry) == "Symmetry(2 tensors, 2 labels, 3 scales, 1 note)"


def test_a_symmetry_of_nothing_has_a_text() -> None:
    assert str(Symmetry({})).startswith("tensor  shape  axes")
    assert Symmetry({}).summary()["covered"] == 0


COMPONENT = st.sampled_from(["0", "1", "2", "3", "a", "b1", "b2", "b07", "w_l0"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(COMPONENT, min_size=1, max_size=4), unique_by=tuple, max_size=24), st.data())
def test_every_name_is_shown_exactly_once(paths: list[list[str]], data: st.DataObject) -> None:
    names = [".".join(path) for path in paths]
    names = [n for n in names if not any(m.startswith(n + ".") for m in names)]
    shape = st.lists(st.integers(1, 2), max_size=2)
    tensors = {n: torch.zeros(data.draw(shape)) for n in names}
    symmetry = independent(tensors)
    if data.draw(st.booleans()):  # tie some axes
        tied = st.sampled_from(["u", None])
        specs = {n: Spec(tuple(Leaf(3, data.draw(tied)) for _ in s.axes), s.roles) for n, s in symmetry.specs.items()}
        symmetry = Symmetry(specs, {"u": Label(3)})
    assert sorted(names_in(sections(symmetry)[0])) == sorted(names)


# ---------------------------------------------------------------------------------------- the numbers
def test_the_numbers_of_an_mlp() -> None:
    assert infer(mlp()).summary() == {
        "tensors": 6,
        "entries": 4 * 6 + 6 + 6 * 5 + 5 + 5 * 3 + 3,
        "covered": pytest.approx(80 / 83),  # all but the last bias
        "labels": 2,
        "fixed_labels": 0,
        "permutation_groups": 2,
        "log10_order": pytest.approx(math.log10(math.factorial(6) * math.factorial(5))),
        "positive_scales": 6,  # ReLU
        "sign_generators": 5,  # tanh
        "notes": 0,
    }


def test_the_numbers_of_a_transformer() -> None:
    found = infer(gpt(2)).summary()
    f = math.factorial
    block = f(3) * f(4) ** (2 * 3) * f(10)  # heads, qk and vo in each of 3 heads, hidden units
    assert found["permutation_groups"] == 1 + 2 * (1 + 3 + 3 + 1)
    assert found["log10_order"] == pytest.approx(math.log10(f(12)) + 2 * math.log10(block))
    # gains of 5 norms of width 12; per block 3 heads of 4 for qk and for vo; GELU lets nothing through
    assert found["positive_scales"] == found["sign_generators"] == 5 * 12 + 2 * 2 * 3 * 4
    entries = sum(p.numel() for p in gpt(2).parameters())
    assert (found["tensors"], found["entries"]) == (len(list(gpt(2).parameters())), entries)
    assert found["covered"] == pytest.approx((entries - 11) / entries)
    assert found["labels"] == 1 + 2 * 4
    assert json.loads(json.dumps(found)) == found


def test_what_cannot_move_is_not_counted_as_moving() -> None:
    labels = {"h": Label(2, fixed=True), "d": Label(3, ("h",)), "one": Label(1), "unused": Label(9)}
    specs = {
        "w": Spec((Leaf(2, "h"), Leaf(3, "d")), ("out", "out")),
        "v": Spec((Leaf(2, "h"), Leaf(1, "one")), ("out", "in")),
    }
    found = Symmetry(specs, labels).summary()
    assert (found["labels"], found["fixed_labels"]) == (3, 1)
    assert (found["covered"], found["permutation_groups"]) == (6 / 8, 2)  # d, once for each of h's two
    assert found["log10_order"] == pytest.approx(2 * math.log10(6))


# ---------------------------------------------------------------------------------------- the document
def test_the_document_shows_what_is_printed() -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "symmetry.md").read_text(encoding="utf-8")
    model, ids = runpy.run_path(str(root / "docs" / "symmetry_gpt.py"))["gpt"]()
    symmetry = infer(model)
    assert str(symmetry).splitlines() == re.findall(r"^```text\n(.*?)^```", text, re.S | re.M)[0].splitlines()
    assert symmetry.check(model, ids) < 1e-12
    namespace: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert blocks
    for block in blocks:
        exec(block, namespace)
