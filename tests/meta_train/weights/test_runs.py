"""Grids of weight-space runs: what is done is not done again, and what is told is what was measured."""

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from meta_train.errors import UnknownName, UsageError
from meta_train.weights import __main__ as command
from meta_train.weights import cnn
from meta_train.weights.runs import (
    Cell,
    Grid,
    Job,
    Run,
    Store,
    cells,
    draw,
    markdown,
    run_grid,
    write_results,
    zoo_digest,
)
from tasks.zoo import cnn as zoos
from tasks.zoo.zoo import Zoo, ZooError, to_columns


def jobs(seeds=3):
    return [Job(m, d, s, {"epochs": 2}) for s in range(seeds) for d in ("a", "b") for m in ("one", "two")]


def count(job, path=None):
    """A job that says that it was done."""
    if path is not None:
        with open(path, "a") as file:
            file.write(job.key + "\n")
    return {"tau": {"one": 0.5, "two": 0.7}[job.method] + 0.01 * job.seed, "bad": math.nan}


def quiet(_):
    pass


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_finished_jobs_are_never_repeated(tmp_path, workers):
    path, log = tmp_path / "runs.jsonl", tmp_path / "log"
    work = partial(count, path=str(log))
    first = run_grid(jobs(1), work, path, say=quiet)
    assert [run.job for run in first] == jobs(1)
    whole = run_grid(jobs(), work, path, workers=workers, say=quiet)
    assert [run.job for run in whole] == jobs()
    assert sorted(log.read_text().splitlines()) == sorted(job.key for job in jobs())
    assert [run.measures["tau"] for run in whole] == [count(job)["tau"] for job in jobs()]
    assert all(math.isnan(run.measures["bad"]) for run in Store(path).runs.values())
    other = [replace(job, settings={"epochs": 3}) for job in jobs(1)]  # other settings are other jobs
    run_grid(other, work, path, say=quiet)
    assert len(Store(path).runs) == len(jobs()) + len(other)


SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    from meta_train.weights.runs import Job, run_grid
    from tests.meta_train.weights.test_runs import jobs

    def work(job):
        if job == jobs()[5]:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"tau": 1.0}

    run_grid(jobs(), work, Path(sys.argv[1]))
"""


def test_a_killed_grid_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "runs.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(path)]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert len(Store(path).runs) == 5
    path.write_bytes(path.read_bytes()[:-10])  # and the last line was cut off
    assert len(Store(path).runs) == 4
    done = []

    def work(job):
        done.append(job)
        return {"tau": 2.0}

    runs = run_grid(jobs(), work, path, say=quiet)
    assert done == jobs()[4:]
    assert [run.measures["tau"] for run in runs] == [1.0] * 4 + [2.0] * 8
    assert len(Store(path).runs) == 12


SLOW = """
    import sys
    from pathlib import Path
    from meta_train.weights.runs import run_grid
    from tests.meta_train.weights.test_runs import jobs, sleep

    if __name__ == "__main__":
        run_grid(jobs(), sleep, Path(sys.argv[1], "runs.jsonl"), workers=2)
"""


def sleep(job):
    """A job that says its process's number and takes longer than any test."""
    print("pid", os.getpid(), flush=True)
    time.sleep(60)
    return {"tau": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, number):
    (tmp_path / "grid.py").write_text(textwrap.dedent(SLOW))
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "grid.py", tmp_path],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    pids = []
    try:
        while len(pids) < 2:
            word, _, rest = parent.stdout.readline().partition(" ")
            assert word, "it ended too early"
            pids += [int(rest)] if word == "pid" else []
        parent.send_signal(number)  # to it alone
        parent.communicate(timeout=60)  # a worker holds the pipe for as long as it lives
    finally:
        for pid in (parent.pid, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        parent.wait()


def test_a_grid_of_nothing_says_so_and_leaves_files(tmp_path, monkeypatch):
    for wrong in ({"seeds": 0}, {"workers": 0}):
        with pytest.raises(UsageError, match="must be 1 or more, not 0"):
            Grid(tmp_path, **wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no GPU"):
        Grid(tmp_path, device="cuda")
    with pytest.raises(UsageError, match="nothing to run"):
        run_grid([], count, tmp_path / "runs.jsonl", say=quiet)
    (tmp_path / "table.md").write_text("the old one")
    with pytest.raises(SystemExit, match="no runs to report"):
        command.main(["cnn", "--out", str(tmp_path), "--report-only"])
    assert (tmp_path / "table.md").read_text() == "the old one" and len(list(tmp_path.iterdir())) == 1
    for wrong in ("inr-classification --batch", "inr-editing --pixels", "cnn --batch", "transformer --count"):
        with pytest.raises(SystemExit, match="error: .* must be 1 or more, not 0"):
            command.main([*wrong.split(), "0", "--out", str(tmp_path)])


def test_the_digest_of_a_zoo_sees_every_part(tmp_path):
    zoo = Zoo({"w": torch.randn(4, 2)}, torch.rand(4), {"run": [1, 1, 2, 2]}, {"test": torch.tensor([3])})
    zoo.save(tmp_path / "zoo")
    assert zoo_digest(Zoo.load(tmp_path / "zoo")) == zoo_digest(replace(zoo, about={"seconds": 3.0})) == zoo_digest(zoo)
    others = [
        replace(zoo, weights={"w": zoo.weights["w"] + 1e-6}),
        replace(zoo, targets=zoo.targets.flip(0)),
        replace(zoo, columns={"run": [1, 2, 1, 2]}),
        replace(zoo, splits={"test": torch.tensor([2])}),
    ]
    assert len({zoo_digest(x) for x in (zoo, *others)}) == 5


def test_the_table_holds_means_and_standard_errors(tmp_path):
    runs = [Run(job, count(job), 1.0 + job.seed) for job in jobs()]
    found = cells(runs, "tau")
    taus = [0.5, 0.51, 0.52]
    cell = found["one", "a"]
    assert cell.mean == pytest.approx(statistics.mean(taus)) and cell.seconds == 2.0
    assert cell.error == pytest.approx(statistics.stdev(taus) / math.sqrt(3))
    text = markdown(found, {("two", "b"): 0.9}, digits=2, titles={"a": "A"})
    assert text.splitlines() == [
        "|     | A           | b                 |",
        "|-----|-------------|-------------------|",
        "| one | 0.51 ± 0.01 | 0.51 ± 0.01       |",
        "| two | 0.71 ± 0.01 | 0.71 ± 0.01 (0.9) |",
    ]
    assert cells(runs[:1], "tau")["one", "a"] == Cell(0.5, None, 1, 1.0)
    assert markdown(cells(runs[:1] + runs[3:4], "tau"), {}) == (
        "|     | a     | b     |\n|-----|-------|-------|\n| one | 0.500 | -     |\n| two | -     | 0.700 |"
    )
    write_results(tmp_path, runs, "tau", title="T", published={("two", "b"): 0.9}, about={"x": 1})
    told = json.loads((tmp_path / "table.json").read_text())
    assert told["about"] == {"x": 1} and len(told["cells"]) == 4
    assert [c["published"] for c in told["cells"] if (c["method"], c["dataset"]) == ("two", "b")] == [0.9]
    for lines in (False, True):
        draw(tmp_path / "p.png", found, {("two", "b"): 0.9, ("one", "a"): "no"}, label="tau", lines=lines)
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["p.png", "table.json", "table.md"]


def test_a_line_after_a_cut_one_is_its_own(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"job": {"meth')
    Store(path).add(jobs()[0], Run(jobs()[0], {"tau": 1.0}, 0.0))
    assert [run.measures for run in Store(path).runs.values()] == [{"tau": 1.0}]


def test_names_are_chosen_or_refused():
    grid = Grid(Path("x"), methods=("two,one",), datasets=("b",))
    assert grid.choose(["one", "two", "three"], ["a", "b"]) == (["one", "two"], ["b"])
    assert Grid(Path("x")).choose(["one"], ["a", "b"]) == (["one"], ["a", "b"])
    with pytest.raises(UnknownName, match="unknown method four; there are one, two"):
        Grid(Path("x"), methods=("four",)).choose(["one", "two"], [])


# ------------------------------------------------------------------------------------------ the experiment on CNNs
def tiny_zoo(folder, activation, count=20):
    """A zoo with two checkpoints a network; its accuracies follow the output bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = {n: p.shape for n, p in zoos.build(activation).named_parameters()}
    weights = {n: torch.randn(2 * count, *s, generator=generator) / 3 for n, s in shapes.items()}
    rows = [
        {"modeldir": f"m/{i // 2}", "step": 10 * (i % 2 + 1), "config.activation": activation} for i in range(2 * count)
    ]
    zoo = Zoo(weights, weights["dense.bias"][:, 0].sigmoid(), to_columns(rows))
    half = count // 2
    for k in (0, half):
        zoo.select(torch.arange(count) + 2 * k).save(folder / "chunks" / f"{k:06d}-{k + half:06d}.safetensors")
    (folder / "settings.json").write_text(json.dumps({"kind": "cnn", "activation": activation, "chunk": half}))
    return zoo


@pytest.fixture
def digits(monkeypatch):
    """Zoos are of digits, and small."""
    monkeypatch.delenv("LEARNED_OPT_DATA", raising=False)
    return zoos.Settings(images=100, steps=2, checkpoints=(1, 2), batch=8)


def rows_of(zoo):
    names, steps = zoo.columns["modeldir"], zoo.columns["step"]
    return [(int(name.rpartition("/")[2]), step) for name, step in zip(names, steps, strict=True)]


def test_what_a_zoo_lacks_is_made_again(tmp_path, digits):
    zoos.make(digits, tmp_path, 5, chunk=4)
    whole = cnn.whole_zoo(tmp_path, "relu", 5)
    assert rows_of(whole) == [(i, s) for i in range(5) for s in (1, 2)]
    files = sorted((tmp_path / "chunks").iterdir())
    assert [path.stem for path in files] == ["000000-000004", "000004-000005"]
    files[0].unlink()
    assert zoo_digest(cnn.whole_zoo(tmp_path, "relu", 5)) == zoo_digest(whole)
    files[1].write_bytes(files[1].read_bytes()[:-50])
    assert zoo_digest(cnn.whole_zoo(tmp_path, "relu", 5)) == zoo_digest(whole)


def test_a_finished_zoo_of_another_size_is_refused_and_stays(tmp_path, digits):
    zoos.make(digits, tmp_path / "zoo", 3, chunk=4)
    before = {path: path.read_bytes() for path in (tmp_path / "zoo").rglob("*") if path.is_file()}
    for count in (2, 5):
        with pytest.raises(ZooError, match=f"finished zoo of 3 networks, not of {count}. Give --count 3"):
            cnn.whole_zoo(tmp_path / "zoo", "relu", count)
    options = f"cnn --out {tmp_path / 'out'} --count 5 --zoo-relu {tmp_path / 'new'} --zoo-tanh {tmp_path / 'zoo'}"
    (tmp_path / "zoo" / "settings.json").write_text('{"kind": "cnn", "activation": "tanh", "chunk": 4}')
    with pytest.raises(SystemExit, match="finished zoo of 3 networks"):
        command.main(options.split())
    assert not (tmp_path / "new").exists()  # it says so before it generates the other
    now = {path: path.read_bytes() for path in before}
    assert {p for p in before if before[p] != now[p]} == {tmp_path / "zoo" / "settings.json"}


def test_a_zoo_of_other_networks_is_refused(tmp_path):
    tiny_zoo(tmp_path / "zoo", "relu")
    options = f"cnn --out {tmp_path / 'out'} --count 20 --zoo-relu {tmp_path / 'new'} --zoo-tanh {tmp_path / 'zoo'}"
    with pytest.raises(SystemExit, match="holds a zoo of .*relu.* not of .*tanh"):
        command.main(options.split())
    assert not (tmp_path / "new").exists()  # it says so before it generates the other
    (tmp_path / "zoo" / "settings.json").write_text('{"kind": "cnn", "activation": "tanh", "chunk": 10}')
    with pytest.raises(ZooError, match="zoo of relu CNNs"):
        cnn.whole_zoo(tmp_path / "zoo", "tanh", 20)


def test_stored_runs_are_of_the_last_zoo_and_may_name_none(capsys):
    plain = [Job(m, d, 0, {"passes": 1}) for d in ("relu", "tanh") for m in ("NP", "HNP")]
    other = [Job("NP", "relu", 0, {"passes": 2}), Job("NP", "relu-1", 0, {"passes": 1})]
    named = replace(plain[0], settings={"passes": 1, "zoo": "abc"})
    old = [Run(job, {"tau": 1.0}, 0.0) for job in (*plain, *other)]
    assert cnn.stored(old, plain) == old[:4] and not capsys.readouterr().out
    new = Run(named, {"tau": 2.0}, 0.0)
    assert cnn.stored([*old, new], plain) == [new, *old[2:4]]
    assert "2 relu zoos" in capsys.readouterr().out


def test_no_network_is_in_two_splits(tmp_path):
    zoo = cnn.by_network(tiny_zoo(tmp_path, "relu"))
    names = {s: {zoo.columns["modeldir"][i] for i in rows.tolist()} for s, rows in zoo.splits.items()}
    assert {s: len(n) for s, n in names.items()} == {"train": 8, "val": 2, "test": 10}
    assert len(set.union(*names.values())) == 20
    assert sum(len(rows) for rows in zoo.splits.values()) == len(zoo)
    wild = replace(
        zoo, weights={**zoo.weights, "conv1.bias": zoo.weights["conv1.bias"].index_fill(0, torch.tensor(6), 200.0)}
    )
    kept = cnn.by_network(wild, limit=100.0)
    assert len(kept) == 38 and "m/3" not in kept.columns["modeldir"]  # both of its checkpoints
    assert {kept.columns["modeldir"][i] for i in kept.splits["test"].tolist()} == names["test"]
    last = cnn.by_network(zoo, "last")
    assert set(last.columns["step"]) == {20} and len(last) == 20
    assert {s: {last.columns["modeldir"][i] for i in rows.tolist()} for s, rows in last.splits.items()} == names


def test_augmented_networks_are_the_same_functions_in_the_same_split(tmp_path):
    for activation, name in (("relu", "relu-100"), ("tanh", "tanh-signs")):
        tiny_zoo(tmp_path / activation, activation)
        _, plain = cnn.dataset_of(tmp_path / activation, activation, "all", 20, 100.0)
        _, zoo = cnn.dataset_of(tmp_path / activation, name, "all", 20, 100.0)
        x = torch.randn(3, 1, 28, 28)
        for split, rows in zoo.splits.items():
            half = len(rows) // 2
            assert torch.equal(rows[:half], plain.splits[split])
            moved = zoos.forward({n: w[rows[half:]] for n, w in zoo.weights.items()}, x, activation)
            own = zoos.forward({n: w[rows[:half]] for n, w in zoo.weights.items()}, x, activation)
            torch.testing.assert_close(moved, own, rtol=1e-3, atol=1e-3)
            assert torch.equal(zoo.targets[rows[half:]], zoo.targets[rows[:half]])
            assert (
                zoo.weights["conv2.weight"][rows[half:]] - zoo.weights["conv2.weight"][rows[:half]]
            ).abs().max() > 0.1
        cnn.dataset_of.cache_clear()


def test_the_command_writes_its_table_and_goes_on(tmp_path, capsys):
    tiny_zoo(tmp_path / "zoo", "relu")
    options = f"cnn --out {tmp_path / 'out'} --zoo-relu {tmp_path / 'zoo'} --passes 40 --count 20".split()
    options += ["--methods", "StatNN", "Monomial"]
    command.main([*options, "--datasets", "relu", "relu-10000", "--seeds", "1"])
    assert (tmp_path / "out" / "relu.png").exists()
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| StatNN " in table and "| Monomial " in table and "0.922" in table
    capsys.readouterr()
    command.main([*options, "--datasets", "relu", "--seeds", "2"])
    assert "runs: 2 of 4 are already there" in capsys.readouterr().out
    lines = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    expected = (tmp_path / "out" / "table.md").read_text()
    command.main([*options, "--report-only", "--datasets", "relu", "--seeds", "2"])
    assert (tmp_path / "out" / "table.md").read_text() == expected
    command.main([*options, "--report-only"])
    assert (tmp_path / "out" / "runs.jsonl").read_text().splitlines() == lines
    header = (tmp_path / "out" / "table.md").read_text().splitlines()[4]
    assert [cell.strip() for cell in header.split("|")[2:4]] == ["ReLU, original", "ReLU, U[1, 10000]"]
    cnn.dataset_of.cache_clear()
    capsys.readouterr()
    chunk = tmp_path / "zoo" / "chunks" / "000000-000010.safetensors"
    zoo = Zoo.load(chunk)
    replace(zoo, targets=zoo.targets.flip(0)).save(chunk)
    command.main([*options, "--datasets", "relu", "--seeds", "1"])
    said = capsys.readouterr().out
    assert "[runs 2/2]" in said and "already there" not in said  # another zoo, other jobs
    cnn.dataset_of.cache_clear()


@pytest.mark.parametrize("experiment", ["cnn", "inr-classification", "inr-editing", "transformer"])
def test_a_zoo_of_nothing_is_refused(experiment, tmp_path):
    with pytest.raises(SystemExit, match="count must be 1 or more, not 0"):
        command.main([experiment, "--out", str(tmp_path / "out"), "--count", "0"])


def test_bad_input_of_the_command_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="unknown method HPN; there are StatNN"):
        command.main(f"cnn --out {tmp_path} --methods HPN".split())
    with pytest.raises(SystemExit, match="usage"):
        command.main(["cnns"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "settings.json").write_text('{"kind"')
    with pytest.raises(SystemExit, match="settings.json is damaged"):
        command.main(f"cnn --out {tmp_path / 'o'} --zoo-relu {tmp_path / 'zoo'} --count 20 --datasets relu".split())
