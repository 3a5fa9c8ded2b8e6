"""Traces: OpenTelemetry's spans of a request over all processes. Off unless the environment says where to.

That is what `OTEL_EXPORTER_OTLP_ENDPOINT` names, a receiver of OTLP by HTTP; OpenTelemetry's other variables
hold too: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables. Spans of several
processes are one trace by W3C's `traceparent`, https://www.w3.org/TR/trace-context, which is "" where there
is none. There is never a prompt, an image or a key in a span.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanKind
    from opentelemetry.util.types import AttributeValue

SERVICE = "glm-image-server"
SWITCHES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
PROTOCOL = "http/protobuf"

Kind = Literal["internal", "server", "client"]

_provider: TracerProvider | None = None


def start(process: str) -> None:
    """Begin with traces, if they are on; once in a process, before its first span.

    Args:
        process: which of the service's it is.

    Raises:
        ValueError: the environment asks for another protocol.
    """
    global _provider
    if _provider or not any(os.environ.get(switch) for switch in SWITCHES):
        return
    for name in PROTOCOLS:
        if (protocol := os.environ.get(name, PROTOCOL)) != PROTOCOL:
            raise ValueError(f"{name} is {protocol!r}; traces are sent by {PROTOCOL} alone")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", SERVICE)
    resource = Resource.create({"service.name": name, "service.instance.id": process})
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))


def stop() -> None:
    """Send what is left, since a replica's process just ends; takes seconds if there is no receiver."""
    global _provider
    if _provider:
        _provider.shutdown()
        _provider = None


def traceparent() -> str:
    """That of the span in which this is asked."""
    if not _provider:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


@contextmanager
def span(
    name: str, *, kind: Kind = "internal", parent: str = "", **attributes: AttributeValue
) -> Iterator[None]:
    """The block is a span; not for asynchronous generators, which may end elsewhere than they began.

    Args:
        name: what is done.
        kind: `server` answers to another process, `client` asks one.
        parent: its `traceparent`; "" for the span in which this is.
        attributes: what else is to be known.
    """
    if not _provider:
        yield
        return
    tracer = _provider.get_tracer(__name__)
    with tracer.start_as_current_span(
        name,
        context=_context(parent),
        kind=_kind(kind),
        attributes=attributes,
        record_exception=False,  # its message may hold anything
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
    """Say more about the span in which this is.

    Args:
        name: another one.
        error: the code of what went wrong, if something did.
        attributes: more of them.
    """
    if not _provider:
        return
    from opentelemetry import trace

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
    """Add a span that is over; see `span` and `note`.

    Args:
        name: what was done.
        began: on the clock of `time.time`.
        ended: likewise.
        kind: see `span`.
        parent: likewise.
        error: see `note`.
        attributes: see `span`.
    """
    if not _provider:
        return
    tracer = _provider.get_tracer(__name__)
    it = tracer.start_span(
        name, context=_context(parent), kind=_kind(kind), attributes=attributes, start_time=int(began * 1e9)
    )
    if error:
        _fail(it, error)
    it.end(int(ended * 1e9))


def _context(parent: str) -> Context | None:
    """What a span is in, by its parent; None, without one, is what is current."""
    if not parent:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent}, context=Context())


def _kind(kind: Kind) -> SpanKind:
    from opentelemetry.trace import SpanKind

    return SpanKind[kind.upper()]


def _fail(it: Span, code: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    it.set_attribute("error.type", code)
    it.set_status(Status(StatusCode.ERROR, code))
