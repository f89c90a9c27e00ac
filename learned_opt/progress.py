"""A progress bar of rich, which is imported when one is made."""

from typing import Any


def progress_bar(console: Any = None) -> Any:
    """A ``rich.progress.Progress`` whose count, percentage and time stay where its description is too long.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    text = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    columns = (MofNCompleteColumn(), BarColumn(12), TaskProgressColumn(), TimeRemainingColumn(), text)
    return Progress(*columns, console=console, expand=True)
