"""The command line that prints the symmetry of a model."""

import builtins
import json
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import learned_opt.symmetry.infer
from learned_opt import Symmetry, SymmetryError, infer_symmetry
from learned_opt.symmetry.cli import main, model_of
from tests.inferred import infer

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
