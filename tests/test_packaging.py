"""What is installed, what an import brings along, and what the committed text must not name."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Import names of everything outside the three dependencies.
OPTIONAL = {
    *("sklearn", "matplotlib", "tyro", "rich", "scipy", "torchvision", "tensorboard", "higher"),
    *("torch.utils.tensorboard", "PIL"),
}


def run(code: str) -> str:
    """Standard output of ``code`` in an interpreter of its own."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def brought_along(package: str, among: set[str]) -> set[str]:
    """Which of ``among`` are imported by the modules of ``package``, other than by torch alone."""
    code = f"""
import importlib, json, pkgutil, sys
import numpy, safetensors.torch, torch
before = set(sys.modules)
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, {package + "."!r}):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    return among & set(json.loads(run(code).splitlines()[-1]))


def test_the_optimizer_imports_no_optional_package():
    assert brought_along("learned_opt", OPTIONAL | {"tasks", "meta_train"}) == set()


def test_what_few_need_is_imported_when_it_is_asked_for():
    """Neither the layers on weight spaces nor the inference of symmetries, which needs torch.export."""
    loaded = "sorted(m for m in sys.modules if m.startswith(('learned_opt.nfn', 'learned_opt.symmetry.infer')))"
    before, after = run(
        f"import sys, learned_opt\nprint({loaded})\nlearned_opt.infer_symmetry, learned_opt.InferenceError\n"
        f"print({loaded})"
    ).splitlines()
    assert before == "[]" and "'learned_opt.symmetry.infer'" in after and "learned_opt.nfn" not in after


def test_tasks_do_not_know_the_optimizer():
    assert brought_along("tasks", {"learned_opt", "meta_train"}) == set()


def test_an_import_that_is_there_is_seen():
    """The two tests above can fail: meta_train does join the other two."""
    assert brought_along("meta_train", {"learned_opt", "tasks"}) == {"learned_opt", "tasks"}


def test_dependencies_are_three():
    names = [re.match(r"[A-Za-z0-9_-]+", d).group() for d in PROJECT["dependencies"]]
    assert sorted(names) == ["numpy", "safetensors", "torch"]


def test_torchvision_belongs_to_torch():
    """A torchvision built for another torch fails here: its operators do not register."""
    pytest.importorskip("torchvision", exc_type=ModuleNotFoundError)
    kept = run(
        "import torch, torchvision\n"
        "boxes = torch.tensor([[0., 0., 1., 1.], [0., 0., 1., 1.]])\n"
        "print(torchvision.ops.nms(boxes, torch.tensor([1., 0.5]), 0.5).tolist())"
    )
    assert kept.split()[-1] == "[0]"


def test_wheel_holds_the_packages_and_their_data(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())

    data = {"*.py", "py.typed", "checkpoints/*.safetensors", "checkpoints/*.json"}
    ours = {
        path.relative_to(ROOT).as_posix()
        for package in ("learned_opt", "tasks", "meta_train")
        for pattern in data
        for path in (ROOT / package).rglob(pattern)
    }
    assert "learned_opt/py.typed" in ours
    assert ours <= held
    outside = {name.split("/")[0] for name in held} - {"learned_opt", "tasks", "meta_train"}
    assert all(name.endswith(".dist-info") for name in outside)


def committed_text() -> dict[str, str]:
    """Relative path -> content of every tracked file that is UTF-8 text."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no git checkout, so there is no list of committed files")
    texts = {}
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix == ".safetensors" or not path.is_file():
            continue
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return texts


# Put together here, so that this file does not name what it looks for.
FOLDERS = "|".join(["work", "tmp", "root", "home", "Users", "mnt"])
MACHINE_PATH = re.compile(r"(?<![\w.)\]}>/-])/(?:" + FOLDERS + r")(?:/|\b(?![\w-]))")
REGISTRY = re.compile("|".join(["pypi" + r"\.", "python" + "hosted", "download" + r"\.pytorch", "index" + "-url"]))


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine path", "registry"])
def test_committed_text_names_no(pattern):
    found = {f"{name}: {match.group()}" for name, text in committed_text().items() for match in pattern.finditer(text)}
    assert found == set()


def test_the_patterns_find_what_they_are_for():
    for folder in FOLDERS.split("|"):
        assert MACHINE_PATH.search(f"open('/{folder}/x')") and MACHINE_PATH.search(f"in /{folder}.")
    assert not MACHINE_PATH.search("learned_opt/work/x ./tmp/x a)/root")
    assert REGISTRY.search("--" + "index" + "-url https://example.com/simple")


def python_blocks(document: str) -> list[str]:
    """The Python blocks of a Markdown file, each moved down to the lines where it stands."""
    text = (ROOT / document).read_text(encoding="utf-8")
    fenced = re.finditer(r"^```python\n(.*?)^```", text, re.S | re.M)
    return ["\n" * text.count("\n", 0, block.start(1)) + block.group(1) for block in fenced]


@pytest.mark.parametrize("document", ["README.md", "docs/usage.md"])
def test_documented_code_runs(document):
    """The blocks of one document, top to bottom, in one namespace."""
    blocks = python_blocks(document)
    assert blocks
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, document, "exec"), namespace)
