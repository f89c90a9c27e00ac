"""The report of an evaluation: tables, pictures, unfinished and foreign files."""

import io

import pytest
from rich.console import Console

from learned_opt.progress import progress_bar
from meta_train.__main__ import main
from meta_train.bench import report as rp
from meta_train.bench.outcomes import Outcome
from meta_train.bench.output import duration, show, table
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
    assert "training.png" in said and " sgdm" in said
    assert (tmp_path / "training.png").exists() and (tmp_path / "report.md").exists()


def test_the_report_names_data_that_depend_on_a_folder():
    tasks = {n: PlannedTask(10, 1.0, "f", source) for n, source in {"a": "MNIST", "b": "MNIST", "c": ""}.items()}
    optimizers = {"adam": PlannedOptimizer("adam", "", None)}
    found = [Outcome("adam", n, 0, None, False, curve([1.0]), 1.0, False, 1.0, {}) for n in tasks]
    assert "\nData: MNIST (a, b).\n" in rp.markdown(Plan("S", tasks, optimizers, 1, 1), found)
    old = Plan.from_dict(
        {**vars(Plan("S", {}, {}, 1, 1)), "tasks": {"a": {"steps": 1, "ceiling": 1.0, "fingerprint": ""}}}
    )
    assert old.tasks["a"].source == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.031, "0.031 seconds"), (3, "3 seconds"), (59.6, "60 seconds"), (240, "4.0 minutes"), (36000, "10.0 hours")],
)
def test_durations_are_in_the_unit_that_suits_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("columns", [2, 12])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit_the_terminal_and_lose_nothing(columns, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    header = ["optimizer", *(f"speed-up of number{k} [95 %]" for k in range(1, columns))]
    rows = [[f"name{i}", *(f"{i}.{k} [0.12, 3.45]" for k in range(1, columns))] for i in range(3)]
    show(f"# Title\n\n{table(header, rows)}\n\nThe end.")
    told = capsys.readouterr().out
    assert all(len(line) <= width for line in told.splitlines())
    assert "# Title" in told and "The end." in told
    assert all(f" {cell}" in told for row in rows for cell in row[1:])
    assert all(word in told for cell in header for word in cell.split())


def test_a_bar_keeps_its_numbers_where_its_text_is_long():
    console = Console(width=80, force_terminal=True, file=io.StringIO())
    with progress_bar(console) as bar:
        bar.add_task("final runs  " + 20 * "a long text ", total=4, completed=1)
    assert "1/4" in console.file.getvalue() and "25%" in console.file.getvalue()
