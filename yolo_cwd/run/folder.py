# SPDX-License-Identifier: AGPL-3.0-or-later
"""The folder of a run: claimed before anything is written, and removed again if the run cannot begin."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultralytics.cfg import get_save_dir


class RunFolder:
    """The folders that a run has made for itself, innermost first; none if the run resumes in its own."""

    def __init__(self) -> None:
        """Start without folders."""
        self.made: list[Path] = []

    def claim(self, args: Any) -> str:
        """Make the folder that Ultralytics would choose, and return its path.

        Ultralytics looks for a free name and makes the folder only later, so two runs started at once would share one.

        Args:
            args: The run's arguments.
        """
        while True:
            folder = get_save_dir(args)
            missing = [f for f in (folder, *folder.parents) if not f.exists()]
            try:
                folder.mkdir(parents=True, exist_ok=bool(args.exist_ok or getattr(args, "save_dir", None)))
            except FileExistsError:
                continue
            self.made = missing
            return str(folder)

    @contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Remove what has been made if an error or an interrupt passes through."""
        try:
            yield
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove what has been made."""
        if self.made:
            run, *parents = self.made
            shutil.rmtree(run, ignore_errors=True)
            for folder in parents:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
