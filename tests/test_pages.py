"""Links between the pages of the repository, and the index of experiments."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_to_files(page):
    targets = {target.split("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target}
    assert not {target for target in targets if not (page.parent / target).exists()}


def test_the_index_has_every_experiment_once_and_in_order():
    index = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\d+)\]\(([^)]+)\)", index, flags=re.MULTILINE)
    folders = sorted(path.parent.name for path in (ROOT / "experiments").glob("[0-9]*/README.md"))
    assert [folder for _, folder in listed] == folders
    assert [f"{int(number):02}" for number, _ in listed] == [folder[:2] for folder in folders]


def test_the_theorem_names_code_that_is_there():
    text = (ROOT / "docs" / "theorem.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py): ([\w.]+)`((?:(?: \([^)]*\))?,\s+`[\w.]+`)*)", text)
    assert len(places) > 20
    missing = []
    for path, first, others in places:
        files = [p for top in ("learned_opt", "tests") for p in (ROOT / top).rglob("*.py")]
        sources = [p.read_text(encoding="utf-8") for p in files if str(p).endswith("/" + path)]
        names = [name.split(".")[-1] for name in [first, *re.findall(r"`([\w.]+)`", others)]]
        missing += [(path, n) for n in names if not any(re.search(rf"(def|class) {n}\b|\b{n}:", s) for s in sources)]
    assert not missing
