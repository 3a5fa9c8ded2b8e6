"""The OpenAI image API, and this server's own routes, which share its errors."""

from serve_app.dialects import native
from serve_app.dialects.base import Dialect
from serve_app.dialects.openai import jobs, routes
from serve_app.dialects.openai.errors import error_response

OPENAI = Dialect(
    name="openai",
    prefixes=("/",),
    routers=(routes.router, jobs.router, native.router),
    error_response=error_response,
    webhooks={jobs.API: jobs.compose},
)
