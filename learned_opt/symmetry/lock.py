"""One inference of a symmetry at a time: ``torch.export`` changes the state of the whole process while it traces."""

import threading
from typing import Self


class ExportLock:
    """Held by the thread that exports; the same thread may take it again. A context."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._thread: int | None = None
        self._depth = 0

    def __enter__(self) -> Self:
        self._lock.acquire()
        self._thread, self._depth = threading.get_ident(), self._depth + 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._thread = None
        self._lock.release()

    def is_elsewhere(self) -> bool:
        """Whether another thread exports: ``torch.compiler.is_compiling`` is then true in this one, too."""
        return self._thread not in (None, threading.get_ident())


EXPORT_LOCK = ExportLock()
