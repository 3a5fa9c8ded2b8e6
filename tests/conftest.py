"""What all tests share: tests that lack something on this machine are skipped, but never in CI."""

import os
import shutil

import pytest

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs g++ (Debian: apt-get install g++)"
)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With FAIL_ON_SKIP set, a run with a skipped test has failed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("FAIL_ON_SKIP") and reporter and reporter.stats.get("skipped"):
        reporter.write_line("a test was skipped, and FAIL_ON_SKIP is set", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
