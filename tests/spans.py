"""A receiver of OTLP by HTTP, https://opentelemetry.io/docs/specs/otlp, as trace collectors are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.receiver import Receiver


@dataclass(frozen=True)
class Span:
    """A span, and of which process it is.

    Attributes:
        process: its `service.instance.id`.
        service: its `service.name`.
        parent_id: empty if it is a trace's first.
        began: in nanoseconds since 1970, as is `ended`.
    """

    process: str
    service: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    began: int
    ended: int
    attributes: dict[str, Any]
    failed: bool


class Collector:
    """Keeps the spans that are sent to it.

    Attributes:
        endpoint: what `OTEL_EXPORTER_OTLP_ENDPOINT` is to be.
    """

    def __init__(self) -> None:
        self._receiver = Receiver()  # whose empty answers are right: an empty message has no bytes
        self.endpoint = f"http://{self._receiver.place}"

    @contextmanager
    def receiving(self) -> Iterator[None]:
        with self._receiver.receiving():
            yield

    @property
    def bodies(self) -> list[bytes]:
        """All that came."""
        return [body for _, body in self._receiver.came]

    @property
    def spans(self) -> list[Span]:
        return [span for headers, body in self._receiver.came for span in _spans(headers, body)]

    def trace(self, trace_id: str) -> list[Span]:
        """Those of one trace."""
        return [span for span in self.spans if span.trace_id == trace_id]


def _spans(headers: Mapping[str, str], body: bytes) -> Iterator[Span]:
    assert {name.lower(): value for name, value in headers.items()}[
        "content-type"
    ] == "application/x-protobuf"
    for of_process in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = _attributes(of_process.resource.attributes)
        for span in (span for scope in of_process.scope_spans for span in scope.spans):
            yield Span(
                process=resource["service.instance.id"],
                service=resource["service.name"],
                name=span.name,
                kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                began=span.start_time_unix_nano,
                ended=span.end_time_unix_nano,
                attributes=_attributes(span.attributes),
                failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
            )


def _attributes(pairs: Any) -> dict[str, Any]:
    def value(pair: KeyValue) -> Any:
        return getattr(pair.value, str(pair.value.WhichOneof("value")))

    return {pair.key: value(pair) for pair in pairs}
