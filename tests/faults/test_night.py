"""A short night; `python -m tests.faults.night` runs long ones."""

from pathlib import Path

import pytest

from tests.faults.night import FAULTS, check, night


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_nothing_is_lost_or_double_or_wrong_after_all_faults(tmp_path: Path) -> None:
    every_s = 30
    report = night(tmp_path, seconds=(FAULTS + 1) * every_s, fault_every_s=every_s, seed=1)
    report.show()  # pytest prints it if something is wrong
    check(report, flat=False)
