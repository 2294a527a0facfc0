# SPDX-License-Identifier: AGPL-3.0-or-later
"""Changes of what all threads of a process share, such as a function of another module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock


class SharedChange:
    """A change that the first who needs it makes, and the last undoes.

    Saved and restored by everyone alone, what is shared would stay changed for good: the second saves what the first
    has changed, and restores that after the first has ended.
    """

    def __init__(self, make: Callable[[], Callable[[], object]]) -> None:
        """Make nothing yet.

        Args:
            make: Makes the change, and returns what undoes it.
        """
        self._make, self._lock, self._users = make, Lock(), 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Have the change made in the context."""
        with self._lock:
            if not self._users:
                self._undo = self._make()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._undo()
