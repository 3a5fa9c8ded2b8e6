"""Writes the pages of `docs/reference` that are generated from the code: `make docs`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_origin

from pydantic import BaseModel

from deployments.config import StageConfig
from serve_app.config import AppConfig
from serve_app.observability import metrics
from tests.docs.errors import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.observability.metrics import Metric

FOLDER = Path(__file__).parents[2] / "docs/reference"


def configuration() -> str:
    """Returns the page of all keys of a configuration."""
    rows = "\n".join(["| Key | Default | Meaning |", "|---|---|---|", *keys(AppConfig)])
    return f"""\
<!-- Written by `make docs`. The texts are in deployments/config.py and serve_app/config.py. -->
# Configuration

A config file is a [Serve config](https://docs.ray.io/en/latest/serve/production-guide/config.html). This
table lists the `args` of its application. A misspelt key is an error at the start. `glm-image-server check
FILE` finds it before, and suggests the right one. `configs/` has a file for each common set of GPUs.

{rows}
"""


def keys(
    model: type[BaseModel], prefix: str = "", described: set[tuple[object, ...]] | None = None
) -> list[str]:
    """Returns the rows of a configuration's keys. A key that stages share is described once.

    Args:
        model: the configuration, or a part of it.
        prefix: path of the part.
        described: what has a row already.
    """
    rows: list[str] = []
    described = set() if described is None else described
    for name, field in model.model_fields.items():
        several = get_origin(field.annotation) is tuple
        kind = (
            get_args(field.annotation)[0] if several or None in _parts(field.annotation) else field.annotation
        )
        key = f"{prefix}{name}{'[]' if several else ''}"
        default = "required"
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            default = "" if value in (None, {}, ()) or isinstance(value, BaseModel) else f"`{value}`"
        row = f"{default.replace(str(Path.home()), '~')} | {field.description}"
        if name in StageConfig.model_fields and (name, row) in described:
            continue
        described.add((name, row))
        rows.append(f"| `{key}` | {row} |")
        if isinstance(kind, type) and issubclass(kind, BaseModel) and (kind,) not in described:
            described.add((kind,))
            rows += keys(kind, f"{key}.", described)
    return rows


def _parts(annotation: object) -> tuple[object, ...]:
    """Returns the parts of a union. None is a part of an optional one."""
    return tuple(None if one is type(None) else one for one in get_args(annotation))


def all_metrics() -> str:
    """Returns the page of all metrics."""
    rows = "\n".join(["| Metric | Kind | Labels | Meaning |", "|---|---|---|---|", *map(_row, metrics.ALL)])
    return f"""\
<!-- Written by `make docs`. The texts are in serve_app/observability/metrics.py. -->
# Metrics

[Observability](../operate/observability.md#metrics) says where they are, and how to use them. Ray adds the
labels `deployment` and `replica`.

{rows}
"""


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    kind = type(metric).__name__.lower()
    return f"| `{metric.exported_as}` | {kind} | {labels} | {metric.description} |"


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "errors.md": errors,
    "metrics.md": all_metrics,
}
"""The function that returns each page, by its file."""


if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
