"""Traces: OpenTelemetry spans of a request, over all processes. Off unless the environment names a receiver.

`OTEL_EXPORTER_OTLP_ENDPOINT` names it: a receiver of OTLP over HTTP. OpenTelemetry's other variables apply
too: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables.

W3C's `traceparent` (https://www.w3.org/TR/trace-context) joins the spans of several processes into one trace.
It is "" if there is none. Spans never contain a prompt, an image or a key.

While tracing is off, OpenTelemetry's API does nothing and its SDK is not imported.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

SERVICE = "glm-image-server"
SWITCHES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
PROTOCOL = "http/protobuf"

Kind = Literal["internal", "server", "client"]

_provider: TracerProvider | None = None
"""The SDK's provider; None while tracing is off."""
_tracer: trace.Tracer = trace.NoOpTracer()


def start(process: str) -> None:
    """Starts tracing if the environment enables it. Call it once in a process, before its first span.

    Args:
        process: name of the process within the service.

    Raises:
        ValueError: the environment chooses a protocol other than `http/protobuf`.
    """
    global _provider, _tracer
    if _provider or not any(os.environ.get(switch) for switch in SWITCHES):
        return
    for name in PROTOCOLS:
        if (protocol := os.environ.get(name, PROTOCOL)) != PROTOCOL:
            raise ValueError(f"{name} is {protocol!r}, but only {PROTOCOL} is supported; unset {name}")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", SERVICE)
    resource = Resource.create({"service.name": name, "service.instance.id": process})
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer(__name__)


def stop() -> None:
    """Sends the remaining spans and stops tracing. Takes seconds if the receiver does not answer.

    Call it when a replica stops, because Serve ends the process abruptly afterwards.
    """
    global _provider, _tracer
    if _provider:
        _provider.shutdown()
        _provider, _tracer = None, trace.NoOpTracer()


def traceparent() -> str:
    """Returns the `traceparent` of the current span, or "" while tracing is off."""
    carrier: dict[str, str] = {}
    if _provider:  # the no-op tracer would pass on a caller's
        TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


@contextmanager
def span(
    name: str, *, kind: Kind = "internal", parent: str = "", **attributes: AttributeValue
) -> Iterator[None]:
    """Runs the block in a span.

    An async generator may contain it only if one task runs the generator from start to end. Another task has
    another context, in which the span cannot end.

    Args:
        name: name of the span.
        kind: `server` answers another process, `client` calls one.
        parent: `traceparent` of the parent; "" for the current span.
        attributes: attributes of the span.
    """
    with _tracer.start_as_current_span(
        name,
        context=_context(parent),
        kind=trace.SpanKind[kind.upper()],
        attributes=attributes,
        record_exception=False,  # an exception's message may contain a prompt
        set_status_on_exception=False,
    ) as it:
        try:
            yield
        except asyncio.CancelledError:
            it.set_attribute("cancelled", True)
            raise
        except Exception as error:
            _fail(it, str(getattr(error, "code", None) or type(error).__name__))
            raise


def note(name: str = "", *, error: str = "", **attributes: AttributeValue) -> None:
    """Adds to the current span.

    Args:
        name: new name of the span; "" keeps the old one.
        error: error code, if the work failed.
        attributes: more attributes of the span.
    """
    it = trace.get_current_span()
    if name:
        it.update_name(name)
    it.set_attributes(attributes)
    if error:
        _fail(it, error)


def record(
    name: str,
    began: float,
    ended: float,
    *,
    kind: Kind = "internal",
    parent: str = "",
    error: str = "",
    **attributes: AttributeValue,
) -> None:
    """Adds a span that has ended already.

    Args:
        name: name of the span.
        began: start of the span, by `time.time`.
        ended: end of the span, by `time.time`.
        kind: `server` answers another process, `client` calls one.
        parent: `traceparent` of the parent; "" for the current span.
        error: error code, if the work failed.
        attributes: attributes of the span.
    """
    it = _tracer.start_span(
        name,
        context=_context(parent),
        kind=trace.SpanKind[kind.upper()],
        attributes=attributes,
        start_time=int(began * 1e9),
    )
    if error:
        _fail(it, error)
    it.end(int(ended * 1e9))


def _context(parent: str) -> Context | None:
    """Returns the context of a parent's `traceparent`, or None, the current context, if it is empty."""
    if not parent:
        return None
    return TraceContextTextMapPropagator().extract({"traceparent": parent}, context=Context())


def _fail(it: trace.Span, code: str) -> None:
    it.set_attribute("error.type", code)
    it.set_status(trace.Status(trace.StatusCode.ERROR, code))
