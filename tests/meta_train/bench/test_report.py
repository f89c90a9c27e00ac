"""The report of an evaluation: tables, pictures, unfinished and foreign files."""


import pytest

from meta_train.__main__ import main
from meta_train.bench import report as rp
from meta_train.bench.outcomes import Outcome
from meta_train.bench.pictures import colours_of
from meta_train.bench.store import Plan, PlannedOptimizer, PlannedTask
from tests.meta_train.bench.tiny import curve, measure

# ------------------------------------------------------------------------------------------ report


def test_report_writes_table_and_pictures(tmp_path):
    measure(tmp_path, ["sgdm", "adamw-cosine"], tasks=["quadratic", "regression"])
    text = rp.report(tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    for name in ("curves.png", "speedups.png", "profile.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {row.split("|")[1].strip() for row in rows} == {
        "optimizer",
        "adam",
        "sgdm",
        "adamw-cosine",
    }
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_pictures_show_the_fastest_and_adam_each_in_a_colour_of_its_own():
    speed_ups = {f"o{i}": 9.0 - i for i in range(9)} | {"adam": 0.5, "o0@all": 8.5}
    optimizers = {n: PlannedOptimizer(n, "", None, shared="@" in n) for n in reversed(speed_ups)}
    plan = Plan("S", {"t": PlannedTask(10, 1.0, "f")}, optimizers, seeds=1, tuning_seeds=1)
    found = [Outcome(n, "t", 0, None, False, curve([1.0]), x, False, x, {}) for n, x in speed_ups.items()]
    colours = colours_of(plan, found)
    assert list(colours) == [*(f"o{i}" for i in range(7)), "adam"]
    assert len(set(colours.values())) == 8
    assert list(colours_of(plan, found[:3])) == ["o0", "o1", "o2"]


def test_report_of_an_unfinished_evaluation_shows_what_is_there(tmp_path):
    measure(tmp_path)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-2]))
    assert "Incomplete: " in rp.report(tmp_path)


def test_report_on_an_empty_folder_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="evaluate --out"):
        main(["report", str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\xff\x00\n\xfe", "without a plan"),
        (b"1\n[2]\n", "without a plan"),
        (b'{"job": {}}\n', "is not of an evaluation"),
        (b'{"plan": 3}\n', "is not of an evaluation"),
        (b'{"job": {"method": "HNP"}, "measures": {}}\n', "is not of an evaluation"),
    ],
)
def test_report_on_another_file_says_so(tmp_path, content, message):
    (tmp_path / "runs.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        main(["report", str(tmp_path)])


def test_report_shows_a_training_and_an_evaluation_in_one_folder(tmp_path, capsys):
    measure(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5, "loss/mlp": 0.5}\n{"loss": 2}\n')
    main(["report", str(tmp_path)])
    said = capsys.readouterr().out
    assert "training.png" in said and "| sgdm" in said
    assert (tmp_path / "training.png").exists() and (tmp_path / "report.md").exists()
