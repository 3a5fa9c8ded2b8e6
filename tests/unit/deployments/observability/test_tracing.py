"""Spans as a collector receives them. Without a collector there are none, and no SDK is imported."""

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from deployments.observability import tracing
from tests.spans import Collector


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Returns the collector of this test's traces."""
    collector = Collector()
    with collector.receiving():
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        tracing.start("process-1")
        yield collector
        tracing.stop()


def test_spans_within_spans_have_them_as_parents(collector: Collector) -> None:
    with tracing.span("outer", kind="server", size=3):
        with tracing.span("inner"):
            here = tracing.traceparent()
        tracing.record("over", time.time() - 2, time.time() - 1, kind="client", error="why")
    tracing.record("elsewhere", time.time() - 1, time.time(), parent=here)
    tracing.stop()
    spans = {span.name: span for span in collector.spans}
    outer, inner, over, elsewhere = (spans[name] for name in ("outer", "inner", "over", "elsewhere"))
    assert here.startswith(f"00-{inner.trace_id}-{inner.span_id}-")
    assert len({span.trace_id for span in spans.values()}) == 1
    assert (outer.parent_id, inner.parent_id, over.parent_id) == ("", outer.span_id, outer.span_id)
    assert elsewhere.parent_id == inner.span_id
    assert (outer.kind, inner.kind, over.kind) == ("server", "internal", "client")
    assert outer.attributes == {"size": 3}
    assert over.ended - over.began == pytest.approx(1e9, rel=0.01)
    assert (over.failed, over.attributes) == (True, {"error.type": "why"})
    assert (outer.process, outer.service) == ("process-1", "glm-image-server")


def test_a_span_has_its_outcome_but_no_message(collector: Collector) -> None:
    with pytest.raises(KeyError), tracing.span("broken"):
        raise KeyError("secret")
    with pytest.raises(asyncio.CancelledError), tracing.span("stopped"):
        raise asyncio.CancelledError
    with tracing.span("named"):
        tracing.note("renamed", error="code", model="m")
    tracing.stop()
    broken, stopped, renamed = collector.spans
    assert (broken.failed, broken.attributes) == (True, {"error.type": "KeyError"})
    assert (stopped.failed, stopped.attributes) == (False, {"cancelled": True})
    assert (renamed.name, renamed.failed) == ("renamed", True)
    assert renamed.attributes == {"error.type": "code", "model": "m"}
    assert not any(b"secret" in body for body in collector.bodies)


@pytest.mark.parametrize("parent", ["", "nonsense", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "ä" * 9000])
def test_an_invalid_parent_is_ignored(collector: Collector, parent: str) -> None:
    with tracing.span("first", parent=parent):
        pass
    tracing.stop()
    (first,) = collector.spans
    assert first.parent_id == ""


def test_a_parent_that_is_not_sampled_has_no_spans(collector: Collector) -> None:
    with tracing.span("first", parent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"):
        assert tracing.traceparent().endswith("-00")
    tracing.stop()
    assert collector.spans == []


def test_an_unreachable_collector_is_only_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracing.start("process-1")
    with caplog.at_level(logging.ERROR), tracing.span("lost"):
        pass
    tracing.stop()
    assert "export" in caplog.text


def test_an_unsupported_protocol_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"):
        tracing.start("process-1")


def test_without_a_collector_there_are_no_spans_and_no_sdk() -> None:
    script = """
import sys
from deployments.observability import tracing
tracing.start("process-1")
with tracing.span("a", parent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"):
    assert tracing.traceparent() == ""
    tracing.note("b", error="c")
    tracing.record("d", 0, 1)
tracing.stop()
assert not [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={"OTEL_SERVICE_NAME": "x"})
