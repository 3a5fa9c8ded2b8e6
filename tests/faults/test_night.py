"""A short night; `python -m tests.faults.night` runs long ones."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.faults.night import FAULTS, Report, Samples, check, night


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_nothing_is_lost_or_double_or_wrong_after_all_faults(tmp_path: Path) -> None:
    every_s = 30
    report = night(tmp_path, seconds=(FAULTS + 1) * every_s, fault_every_s=every_s, seed=1)
    report.show()  # pytest prints it if something is wrong
    check(report, flat=False)


@pytest.mark.parametrize(
    ("name", "growth", "is_fine"),
    [
        ("ray::ServeReplica:m:decoder 7", (5, 9, 9), True),
        ("ray::ServeReplica:m:decoder 7", (6, 0, 0), False),
        ("ray::ServeReplica:m:decoder 7", (0, 10, 0), False),
        ("ray::ServeReplica:m:decoder 7", (0, 0, 10), False),
        ("log_monitor.py 8", (0, 11, 0), True),
        ("log_monitor.py 8", (0, 12, 0), False),
    ],
)
def test_a_process_that_has_grown_is_reported(
    name: str, growth: tuple[int, int, int], *, is_fine: bool
) -> None:
    mib, files, threads = ([100] * 150 + [100 + more] * 50 for more in growth)
    report = Report(faults=Counter(map(str, range(FAULTS))))
    report.processes[name] = Samples([*map(float, mib)], files, threads)
    with nullcontext() if is_fine else pytest.raises(AssertionError, match=name):
        check(report, flat=True)
