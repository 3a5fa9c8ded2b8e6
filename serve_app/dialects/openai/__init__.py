"""The OpenAI image API, and this server's own routes, which share its errors."""

from serve_app.dialects import native, native_operator
from serve_app.dialects.base import Dialect
from serve_app.dialects.openai import jobs, routes
from serve_app.dialects.openai.errors import error_response

OPENAI = Dialect(
    name="openai",
    prefixes=("/",),
    routers=(routes.router, jobs.router, native.router, native_operator.router),
    error_response=error_response,
    tags={
        "OpenAI": "OpenAI's image API: https://platform.openai.com/docs/api-reference/images.",
        "Jobs": "Generations and edits that the server makes and keeps while the client is away.",
        "Server": "Health, progress, versions and files.",
        "Operator": "An overview of all keys' work, and changes to it. Needs a key with the role `operator`.",
    },
    webhooks={jobs.API: jobs.compose},
)
