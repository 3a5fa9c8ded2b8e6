"""The metrics are named by Prometheus's rules: https://prometheus.io/docs/practices/naming."""

import re

import pytest

from deployments.observability.metrics import SECONDS, Counter, Gauge, Histogram, Metric
from serve_app.observability import metrics


@pytest.mark.parametrize("metric", metrics.ALL, ids=lambda metric: metric.name)
def test_a_metrics_name_shows_its_kind_and_unit(metric: Metric) -> None:
    assert re.fullmatch("ray_image_server_[a-z_]+", metric.exported_as)
    assert metric.exported_as.endswith("_total") == isinstance(metric, Counter)
    if isinstance(metric, Histogram):
        assert metric.name.endswith("_seconds")
    assert not {"deployment", "replica", "application"} & set(metric.labels), "Serve adds these"


def test_all_metrics_have_different_names() -> None:
    assert len({metric.exported_as for metric in metrics.ALL}) == len(metrics.ALL) > 15


def test_the_buckets_are_positive_and_ascending() -> None:
    assert SECONDS[0] > 0
    assert list(SECONDS) == sorted(set(SECONDS))


def test_an_amount_of_zero_is_ignored_and_a_missing_label_is_an_error() -> None:
    counter = Counter("unit_test_things", "Things.", "kind")
    counter.add(0, kind="none")
    counter.add(2, kind="some")
    with pytest.raises(ValueError, match="kind"):
        counter.add(1)
    Gauge("unit_test_level", "A level.").set(0)
    Histogram("unit_test_seconds", "Seconds.").observe(-0.001)
