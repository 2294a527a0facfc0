# SPDX-License-Identifier: AGPL-3.0-or-later
"""Changes to what all threads of a process share, such as a function of another module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock


class SharedChange:
    """A change that its first user makes and its last user undoes.

    If each user saved and restored on its own, the change could stay for good: a second user would save the changed
    state, and restore it after the first user has ended.
    """

    def __init__(self, make: Callable[[], Callable[[], object]]) -> None:
        """Prepare the change without making it.

        Args:
            make: Makes the change, and returns what undoes it.
        """
        self._make, self._lock, self._users = make, Lock(), 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Apply the change within the context."""
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
