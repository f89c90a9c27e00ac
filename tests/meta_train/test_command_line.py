"""The command lines: what cannot be done is one line that says so, before anything is written."""

import gzip
import shlex
import subprocess
import sys

import pytest

import learned_opt.__main__
import meta_train.__main__
from meta_train import jsonl
from meta_train.recipes import RECIPES

REFUSED = {
    # two optimizers of one label would be one row
    "evaluate --optimizers x=adamw x=muon": "'x=muon': the label 'x' is taken by 'adamw'",
    "evaluate --optimizers adam=muon": "the label 'adam' is the name of an optimizer",
    "evaluate --optimizers muon=sgdm muon": "the label 'muon' is the name of an optimizer",
    "evaluate --optimizers nfnopt=nfn:whitened_polar": "the label 'nfnopt' is the name of an optimizer",
    "evaluate --optimizers nfn:nfn-permutation": "unknown rule 'nfn-permutation'",
    "evaluate --suite SEEN --data nowhere": "the data folder nowhere does not exist",
    "evaluate --seeds 0": "seeds must be 1 or more, not 0",
    "evaluate --tuning-seeds 0": "tuning_seeds must be 1 or more, not 0",
    "evaluate --workers 0": "workers must be 1 or more, not 0",
    "evaluate --steps -5": "steps must be 1 or more, not -5",
    "evaluate --optimizers nfnopt@lr=-1": "unknown option @lr=-1 of NFNOpt: use @lr=NUMBER, positive and finite",
    "evaluate --optimizers nfnopt@lr=0": "@lr=NUMBER, positive and finite",
    "evaluate --optimizers nfnopt@lr=nan": "@lr=NUMBER, positive and finite",
    "evaluate --optimizers nfn:whitened_polar@lr=inf": "@lr=NUMBER, positive and finite",
    "evaluate --out a_file": "--out a_file: a_file is a file. Name a folder",
    "evaluate --out a_file/sub": "--out a_file/sub: a_file is a file. Name a folder",
    "evaluate --suite SEEN --tasks mlp-handwriting --data a_folder.json": "a_folder.json has no MNIST",
    "demo --workers 0": "workers must be 1 or more, not 0",
    "demo --steps 0": "steps must be 1 or more, not 0",
    "demo --out a_file": "a_file is a file. Name a folder",
    "train tiny --out a_file": "a_file is a file. Name a folder",
    "train text.py": "recipe in text.py gives str: it must be a function that returns a Recipe",
    "train plain.py": "recipe in plain.py gives int: it must be a function that returns a Recipe",
    "throughput other.py": "unknown task family other. Choose from mlp,",
    "throughput text.py": "it must be a function that returns a Recipe",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "a_file").write_text("")
    (tmp_path / "a_folder.json").mkdir()
    (tmp_path / "text.py").write_text("def recipe():\n    return 'text'\n")
    (tmp_path / "plain.py").write_text("recipe = 3\n")
    (tmp_path / "other.py").write_text(
        "from meta_train.recipes import Recipe\ndef recipe():\n    return Recipe(families={'other': 1.0})\n"
    )
    monkeypatch.chdir(tmp_path)
    meta_train.__main__._defined.cache_clear()
    before = sorted(tmp_path.rglob("*"))
    yield tmp_path
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_one_line(folder, arguments):
    with pytest.raises(SystemExit) as error:
        meta_train.__main__.main(shlex.split(arguments))
    text = str(error.value.code)
    assert text.startswith("error: ") and REFUSED[arguments] in text and "\n" not in text


def test_help_lists_the_recipes(capsys):
    with pytest.raises(SystemExit):
        meta_train.__main__.main(["train", "--help"])
    told = capsys.readouterr().out
    assert all(f" {name}" in told for name in RECIPES)
    with pytest.raises(SystemExit, match=f"unknown recipe 'shiped'.*{', '.join(RECIPES)}"):
        meta_train.__main__.main(["train", "shiped"])


@pytest.mark.parametrize(
    "option",
    [
        "--lr -1",
        "--lr nan",
        "--weight-decay -1",
        "--betas 2 2",
        "--validate-every -1",
        "--validation-steps 1",
        "--clip-gradient -1",
        "--minutes -1",
        "--curriculum -1",
    ],
)
def test_impossible_fields_of_a_recipe_are_refused(folder, capsys, option):
    with pytest.raises(SystemExit) as error:
        meta_train.__main__.main(["train", "tiny", "--out", "run", *option.split()])
    told = f"{error.value.code} {capsys.readouterr()}"
    assert "Pass another value" in told and option.split()[0].strip("-").replace("-", "_") in told
    assert error.value.code != 0 and "Traceback" not in told


def test_a_folder_in_place_of_a_file_of_symmetry(folder):
    with pytest.raises(SystemExit, match=r"^error: --json a_folder.json: it is a folder. Name a file.$"):
        learned_opt.__main__.main(["symmetry", "torch.nn:Identity", "--input", "2,3", "--json", "a_folder.json"])


def test_python_dash_m_ends_with_a_code_and_no_traceback(folder):
    command = [sys.executable, "-m", "meta_train", "evaluate", "--optimizers", "x=adamw", "x=muon"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_training_whose_log_was_cut_off_is_drawn(tmp_path, capsys):
    jsonl.append(tmp_path / "log.jsonl", {"step": 1, "loss": 0.5, "loss/mlp": 0.5})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # as by kill -9
    meta_train.__main__.main(["report", str(tmp_path)])
    assert "training.png" in capsys.readouterr().out and (tmp_path / "training.png").exists()


def test_a_line_after_one_that_was_cut_off_is_whole(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert jsonl.read(path) == []
    path.write_text('{"a": 1}\n{"b": ')
    jsonl.append(path, {"c": 3})
    assert jsonl.read(path) == [{"a": 1}, {"c": 3}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        jsonl.append(path, {"d": float("nan")})
    assert jsonl.read(path) == [{"a": 1}, {"c": 3}]


def test_a_compressed_file_is_read_before_what_was_appended_since(tmp_path):
    path, compressed = tmp_path / "lines.jsonl", tmp_path / "lines.jsonl.gz"
    compressed.write_bytes(gzip.compress(b'{"a": 1}\n{"b": 2}\n'))
    assert jsonl.read(path) == jsonl.read(compressed) == [{"a": 1}, {"b": 2}]
    before = compressed.read_bytes()
    jsonl.append(path, {"c": 3})
    assert jsonl.read(path) == [{"a": 1}, {"b": 2}, {"c": 3}]
    assert compressed.read_bytes() == before and path.read_text() == '{"c":3}\n'
