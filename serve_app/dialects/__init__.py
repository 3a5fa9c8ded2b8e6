"""The APIs that the server speaks. A new one is a `Dialect` in the tuple below."""

from serve_app.dialects.base import Dialect
from serve_app.dialects.fal import FAL
from serve_app.dialects.openai import OPENAI
from serve_app.dialects.pixazo import PIXAZO
from serve_app.dialects.zai import ZAI

DIALECTS: tuple[Dialect, ...] = (OPENAI, FAL, ZAI, PIXAZO)
"""All of them. The first one words the errors of paths that belong to none."""
