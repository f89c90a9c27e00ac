"""The picture of a symmetry."""

import itertools
from pathlib import Path

import pytest

from learned_opt import Symmetry, SymmetryError
from learned_opt.symmetry.plot import draw, lines_of
from tests.inferred import infer
from tests.symmetry.test_table import gpt, hidden, mlp


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
