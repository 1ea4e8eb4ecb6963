from __future__ import annotations

import pytest

from benchmarks.forecast import compare
from harness import registry
from harness.errors import UserError


def test_an_entry_that_can_not_be_run_is_refused_with_its_reason() -> None:
    pending = next(entry for entry in registry.entries() if entry.status == "pending")
    with pytest.raises(UserError, match=f"{pending.name} can't be run: "):
        compare(pending.name, None)
