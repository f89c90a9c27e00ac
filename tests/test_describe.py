"""The table, the numbers and the picture of a symmetry, and the command line that prints them."""

import builtins
import itertools
import json
import math
import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import learned_opt.symmetry.infer
from learned_opt import Symmetry, SymmetryError, independent, infer_symmetry
from learned_opt.symmetry import Label, Scale, Spec
from learned_opt.symmetry.axes import Leaf, Prod, Sum
from learned_opt.symmetry.cli import main, model_of
from learned_opt.symmetry.plot import draw, lines_of
from learned_opt.symmetry.table import one_line
from tasks.transformer import Transformer
from tests.inferred import infer

torch.set_num_threads(1)


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


# ---------------------------------------------------------------------------------------- the picture
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture_is_written_and_is_the_same_again(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    infer(gpt(2)).draw(first)
    infer(gpt(2)).draw(second)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size > 5000 and sorted(tmp_path.iterdir()) == [first, second]
    if suffix == "svg":
        words = first.read_text()
        assert ">blocks.1.fc1.weight<" in words and ">pos:12  real x 5<" in words


def test_a_deep_picture_folds(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    infer(gpt(12)).draw(tmp_path / "a.svg")
    assert ">blocks.{0..11}.<" in (tmp_path / "a.svg").read_text()


def test_lines_in_one_lane_never_meet() -> None:
    from learned_opt.symmetry.table import Words, fold, rows_of

    for symmetry in (infer(gpt(3)), infer(mlp()), hidden(["a", "b", "c"])):
        items = fold(symmetry, repeats=False)
        lines = lines_of(symmetry, rows_of(symmetry, items, Words(symmetry, items)))
        assert {line.label for line in lines} == set(symmetry.labels)
        for a, b in itertools.combinations(lines, 2):
            assert a.lane != b.lane or a.last < b.first or b.last < a.first


def test_a_picture_of_another_kind_or_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SymmetryError, match=r"\.svg"):
        draw(infer(mlp()), tmp_path / "a.txt")
    with pytest.raises(SymmetryError, match="no tensors"):
        draw(Symmetry({}), tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- the document
def test_the_document_shows_what_is_printed() -> None:
    root = Path(__file__).resolve().parents[1]
    text = (root / "docs" / "symmetry.md").read_text(encoding="utf-8")
    model, ids = runpy.run_path(str(root / "docs" / "experiments" / "symmetry_gpt.py"))["gpt"]()
    symmetry = infer(model)
    assert str(symmetry).splitlines() == re.findall(r"^```text\n(.*?)^```", text, re.S | re.M)[0].splitlines()
    assert symmetry.check(model, ids) < 1e-12
    namespace: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert blocks
    for block in blocks:
        exec(block, namespace)


# --------------------------------------------------------------------------------------- command line
USER = """
import torch
from torch import nn

def net(): return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
def one(): return net(), torch.ones(2, 4)
def many(): return net(), (torch.ones(2, 4),)
def named(): return net(), {"input": torch.ones(2, 4)}
def both(): return net(), (), {"input": torch.ones(2, 4)}
def tokens(): return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
def sized(n): return nn.Linear(n, n)
def text(): return "a model"
def odd(): return net(), (), "kwargs"
ready = net()
class Space: inner = staticmethod(net)
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A folder with usermodel.py; inference leaves out the check and notes its calls."""
    pytest.importorskip("tyro")
    (tmp_path / "usermodel.py").write_text(USER)
    (tmp_path / "needy.py").write_text("import a_package_that_is_missing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("usermodel", "needy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    calls: list[tuple] = []

    def noted(model: nn.Module, *inputs: Tensor, verify: object, keywords: Mapping[str, Tensor]) -> Symmetry:
        calls.append((model, inputs, verify, keywords))
        return infer_symmetry(model, *inputs, verify=False, keywords=keywords)

    monkeypatch.setattr(learned_opt.symmetry.infer, "infer_symmetry", noted)
    yield calls
    sys.modules.pop("usermodel", None)


@pytest.mark.parametrize("target", ["one", "many", "named", "both"])
def test_inputs_that_come_with_the_model(user: list[tuple], capsys: pytest.CaptureFixture, target: str) -> None:
    main(["symmetry", f"usermodel:{target}"])
    ((model, inputs, verify, kwargs),) = user
    given_input = kwargs["input"] if kwargs else inputs[0]
    assert torch.equal(given_input, torch.ones(2, 4)) and len(inputs) + len(kwargs) == 1
    assert verify == "auto" and model.training
    assert capsys.readouterr().out == f"{infer(model)}\n"


@pytest.mark.parametrize("target", ["net", "ready", "Space.inner"])
def test_an_input_of_a_shape(user: list[tuple], target: str) -> None:
    main(["symmetry", f"usermodel:{target}", "--input", "3,4", "--eval", "--no-verify"])
    ((model, (x,), verify, kwargs),) = user
    assert (x.shape, x.dtype, verify, kwargs, model.training) == ((3, 4), torch.float32, False, {}, False)


def test_token_ids(user: list[tuple]) -> None:
    main(["symmetry", "usermodel:tokens", "--input", "2,50", "--dtype", "int64", "--vocab", "7", "--verify"])
    ((_, (x,), verify, _),) = user
    assert (x.dtype, x.unique().tolist(), verify) == (torch.int64, list(range(7)), True)


def test_several_inputs(user: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    main(["symmetry", "torch.nn:Identity", "--input", "2,4"])
    with pytest.raises(SystemExit, match=r"cannot be run with \(float32 \[2, 4\], float32 \[2, 3\]\)"):
        main(["symmetry", "usermodel:net", "--input", "2,4", "--input", "2,3"])


def test_a_model_of_torchvision(user: list[tuple], capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("torchvision")
    main(["symmetry", "torchvision.models:resnet18", "--input", "2,3,64,64"])
    assert "layer1.{0,1}." in capsys.readouterr().out


def test_files(user: list[tuple]) -> None:
    pytest.importorskip("matplotlib")
    main(["symmetry", "usermodel:one", "--json", "s.json", "--picture", "s.svg"])
    symmetry = infer(model_of("usermodel:net")[0])
    assert Symmetry.from_dict(json.loads(Path("s.json").read_text())).to_dict() == symmetry.to_dict()
    assert Path("s.svg").read_text().lstrip().startswith("<?xml")
    assert not [p for p in Path().iterdir() if p.name.startswith(".")]


ERRORS = {
    "usermodel": "not of the form module:callable",
    "nowhere:net": "no module 'nowhere', neither installed nor in",
    "usermodel.py:net": r"no module 'usermodel\.py'|not a package",
    "needy:net": "importing needy failed: No module named 'a_package_that_is_missing'",
    "usermodel:nett": r"usermodel has no 'nett'. It has: .*net",
    "usermodel:sized": r"usermodel:sized needs arguments \(missing a required argument: 'n'\)",
    "usermodel:text": r"usermodel:text\(\) returned str: it must return a model",
    "usermodel:odd": "kwargs of str: they must be a dict",
    "usermodel:USER": "has no 'USER'",
    "usermodel:net": "no example input. Give its shape",
    "usermodel:net --input 2,x": "a shape is positive numbers separated by commas",
    "usermodel:net --input 2,0": "a shape is positive numbers separated by commas",
    "usermodel:net --input 2,5": r"(?s)cannot be run with \(float32 \[2, 5\]\).*mat1 and mat2.*Give one --input",
    "usermodel:tokens --input 2,5": r"(?s)cannot be run with \(float32 \[2, 5\]\).*--dtype int64",
    "usermodel:tokens --input 2,5 --dtype int64 --vocab 0": "must be at least 1",
    "usermodel:one --train --eval": "contradict each other",
    "usermodel:one --verify --no-verify": "contradict each other",
    "usermodel:one --picture a.gif": r"must end in \.svg or \.png or \.pdf",
    "usermodel:one --json nowhere/a.json": "there is no folder nowhere",
}


@pytest.mark.parametrize("arguments", ERRORS)
def test_errors_say_what_to_do(user: list[tuple], arguments: str) -> None:
    with pytest.raises(SystemExit, match=ERRORS[arguments]) as error:
        main(["symmetry", *arguments.split()])
    assert str(error.value).startswith("error: ") and not user


def test_a_refusal_of_the_inference_is_one_line(user: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Symmetry:
        raise SymmetryError("this model cannot be exported")

    monkeypatch.setattr(learned_opt.symmetry.infer, "infer_symmetry", refuse)
    with pytest.raises(SystemExit, match="^error: this model cannot be exported$"):
        main(["symmetry", "usermodel:one"])


def test_an_interruption_ends_quietly(
    user: list[tuple], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt(*_: object, **__: object) -> Symmetry:
        raise KeyboardInterrupt

    monkeypatch.setattr(learned_opt.symmetry.infer, "infer_symmetry", interrupt)
    with pytest.raises(SystemExit) as error:
        main(["symmetry", "usermodel:one"])
    assert (error.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_without_tyro_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: object, **named: object) -> object:
        if name == "tyro":
            raise ModuleNotFoundError("No module named 'tyro'", name="tyro")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(SystemExit, match=r"tyro is not installed. Run: pip install 'learned-opt\[meta\]'"):
        main(["symmetry", "usermodel:one"])


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_python_dash_m(user: list[tuple], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["learned_opt", "symmetry", "usermodel:one"])
    runpy.run_module("learned_opt", run_name="__main__")
    assert "0.weight  6 x 4  [0:6+, 4]" in capsys.readouterr().out
