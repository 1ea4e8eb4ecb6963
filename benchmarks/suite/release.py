"""What commands take on the bundled release: its tables are read, checked, compared, ranked."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from harness.leaderboard.board import derive, derived_of_release
from spectra_db import check
from spectra_db.diff import compare
from spectra_db.loading import BUNDLED
from spectra_db.release import release
from spectra_db.schema import TABLES


class Bundled:
    """The bundled release, a copy of it, and a cache in which nothing was found to follow yet."""

    timeout = 1800
    number = 1
    repeat = 1
    warmup_time = 0

    def setup(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.copy = Path(shutil.copytree(BUNDLED, Path(self.folder.name, "copy")))
        os.environ["XDG_CACHE_HOME"] = self.folder.name

    def teardown(self) -> None:
        self.folder.cleanup()


class Release(Bundled):
    """`harness dataset check`, `diff` with itself, `leaderboard` and `dataset release`."""

    def time_check(self) -> None:
        assert not check.problems(BUNDLED, derived=derived_of_release())

    def time_diff(self) -> None:
        for table in TABLES:
            compare(BUNDLED, self.copy, table)

    def time_leaderboard(self) -> None:
        derive(self.copy)

    def time_release(self) -> None:
        release(BUNDLED, Path(self.folder.name, "made"), "99.0.0", derive=derive)


class Again(Bundled):
    """`harness dataset check` where the same was checked before."""

    def setup(self) -> None:
        super().setup()
        check.problems(BUNDLED, derived=derived_of_release())

    def time_check(self) -> None:
        assert not check.problems(BUNDLED, derived=derived_of_release())
