"""Tests of alerts and dashboard: promtool accepts them, their metrics exist, and alerts fire correctly."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.observability.metrics import Histogram
from serve_app.observability import metrics

FOLDER = Path(__file__).parents[2] / "k8s/monitoring"
ALERTS, DASHBOARD = FOLDER / "alerts.yaml", FOLDER / "dashboard.json"
pytestmark = pytest.mark.skipif(
    not shutil.which("promtool"), reason="needs promtool (Debian: apt-get install prometheus)"
)
OURS = {
    f"{metric.exported_as}{suffix}"
    for metric in metrics.ALL
    for suffix in (("_bucket", "_count") if isinstance(metric, Histogram) else ("",))
}
RAYS = {
    "ray_serve_deployment_replica_healthy",
    "ray_serve_autoscaling_target_replicas",
    "ray_node_disk_free",
    "ray_node_disk_usage",
}
"""Ray's own metrics that are used. `tests.serve.test_metrics` tests that they exist."""
WINDOWS = {"$__rate_interval": "5m"}
RULES: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]


def promtool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], check=False, cwd=cwd, capture_output=True, text=True)


def queries(part: Any) -> Iterator[str]:
    """Yields every query of a dashboard, with Grafana's variables replaced."""
    if isinstance(part, list):
        for one in part:
            yield from queries(one)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name == "expr":
                for variable, window in WINDOWS.items():
                    value = value.replace(variable, window)
                yield value
            else:
                yield from queries(value)


def dashboard_queries() -> list[str]:
    return list(queries(json.loads(DASHBOARD.read_text())))


def named(query: str) -> set[str]:
    return set(re.findall(r"\bray_[a-z_]+", query))


def test_every_query_of_the_dashboard_is_valid(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}", "expr": query} for i, query in enumerate(dashboard_queries())]
    assert len(rules) > 20
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = promtool("check", "rules", "--lint=none", "rules.yaml", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    rules[0]["expr"] += ")"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert promtool("check", "rules", "--lint=none", "rules.yaml", cwd=tmp_path).returncode == 1


def test_queries_and_alerts_use_existing_metrics() -> None:
    for query in [*dashboard_queries(), *(rule["expr"] for rule in RULES)]:
        assert named(query), query
        assert named(query) <= OURS | RAYS, query


def test_the_dashboard_shows_every_metric() -> None:
    shown = set().union(*map(named, dashboard_queries()))
    hidden = {name for name in OURS - shown if not name.endswith(("_count", "_bucket"))}
    assert not hidden


def test_alerts_are_valid_and_name_an_action() -> None:
    checked = promtool("check", "rules", ALERTS.name, cwd=FOLDER)
    assert checked.returncode == 0, checked.stderr
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert len(rule["annotations"]["action"]) > 40, rule["alert"]


def counting(name: str, *labels: str, every_minute: str) -> dict[str, str]:
    return {"series": f"{name}{{{','.join(labels)}}}", "values": every_minute}


FIRST = "_x15 1x60"
"""Values of a counter whose first event occurs after 15 minutes: the series begins then, at 1."""
CASES: dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]] = {
    "JobsWaitLong": (
        [counting("ray_image_server_oldest_job_seconds", every_minute="0+60x60")],
        [counting("ray_image_server_oldest_job_seconds", every_minute="800+0x60")],
    ),
    "RequestsAreRejected": (
        [
            counting("ray_image_server_requests_total", 'outcome="succeeded"', every_minute="0+9x60"),
            counting("ray_image_server_requests_total", 'outcome="rejected"', every_minute="0+1x60"),
        ],
        [
            counting("ray_image_server_requests_total", 'outcome="succeeded"', every_minute="0+99x60"),
            counting("ray_image_server_requests_total", 'outcome="rejected"', every_minute="0+1x60"),
        ],
    ),
    "ImagesFail": (
        [
            counting("ray_image_server_images_total", 'model="m"', 'outcome="made"', every_minute="0+9x60"),
            counting("ray_image_server_images_total", 'model="m"', 'outcome="failed"', every_minute="0+1x60"),
        ],
        [
            counting("ray_image_server_images_total", 'model="m"', 'outcome="made"', every_minute="0+99x60"),
            counting("ray_image_server_images_total", 'model="m"', 'outcome="failed"', every_minute="0+1x60"),
        ],
    ),
    "ReplicasDie": (
        [counting("ray_image_server_retries_total", 'model="m"', 'stage="prior"', every_minute="_x15 3x60")],
        [counting("ray_image_server_retries_total", 'model="m"', 'stage="prior"', every_minute=FIRST)],
    ),
    "StageIsNotReady": (
        [counting("ray_serve_autoscaling_target_replicas", 'deployment="m-prior"', every_minute="1x60")],
        [
            counting("ray_serve_autoscaling_target_replicas", 'deployment="m-prior"', every_minute="1x60"),
            counting("ray_serve_deployment_replica_healthy", 'deployment="m-prior"', every_minute="1x60"),
        ],
    ),
    "BackgroundTaskFails": (
        [
            counting(
                "ray_image_server_background_failures_total", 'task="delete old files"', every_minute="0+1x60"
            )
        ],
        [
            counting(
                "ray_image_server_background_failures_total", 'task="delete old files"', every_minute="3x60"
            )
        ],
    ),
    "LoadingFails": (
        [counting("ray_image_server_loads_total", 'deployment="d"', 'outcome="failed"', every_minute=FIRST)],
        [
            counting(
                "ray_image_server_loads_total", 'deployment="d"', 'outcome="failed"', every_minute="1x60"
            ),
            counting(
                "ray_image_server_loads_total", 'deployment="d"', 'outcome="loaded"', every_minute=FIRST
            ),
        ],
    ),
    "ChecksFail": (
        [counting("ray_image_server_errors_total", 'code="safety_check_failed"', every_minute=FIRST)],
        [counting("ray_image_server_errors_total", 'code="invalid_value"', every_minute=FIRST)],
    ),
    "WebhooksAreGivenUp": (
        [counting("ray_image_server_webhooks_total", 'outcome="given_up"', every_minute=FIRST)],
        [counting("ray_image_server_webhooks_total", 'outcome="failed"', every_minute=FIRST)],
    ),
    "DiskFills": (
        [
            counting("ray_node_disk_free", 'NodeAddress="a"', every_minute="9x60"),
            counting("ray_node_disk_usage", 'NodeAddress="a"', every_minute="91x60"),
        ],
        [
            counting("ray_node_disk_free", 'NodeAddress="a"', every_minute="50x60"),
            counting("ray_node_disk_usage", 'NodeAddress="a"', every_minute="50x60"),
        ],
    ),
}
"""Two lists of series for each alert: it fires on the first one and stays silent on the second one."""


def fires(alert: str, series: list[dict[str, str]], folder: Path) -> bool:
    """Returns whether the alert fires at minute 24. Later, a single event is no longer recent."""
    case = {
        "interval": "1m",
        "input_series": series,
        "alert_rule_test": [{"eval_time": "24m", "alertname": alert, "exp_alerts": []}],
    }
    test = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [case]}
    (folder / "test.yaml").write_text(yaml.safe_dump(test))
    ran = promtool("test", "rules", "test.yaml", cwd=folder)
    output = ran.stdout + ran.stderr
    assert ran.returncode == 0 or "got:" in output, output
    return ran.returncode != 0


def test_every_alert_has_its_cases() -> None:
    assert CASES.keys() == {rule["alert"] for rule in RULES}


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_and_stays_silent(alert: str, tmp_path: Path) -> None:
    firing, silent = CASES[alert]
    assert fires(alert, firing, tmp_path)
    assert not fires(alert, silent, tmp_path)
    assert not fires(alert, [], tmp_path)
