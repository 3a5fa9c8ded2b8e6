"""fal's API: https://docs.fal.ai/model-endpoints."""

from serve_app.dialects.base import Dialect
from serve_app.dialects.fal import routes, views
from serve_app.dialects.fal.errors import error_response
from serve_app.dialects.fal.hosts import PATHS, Hosts

FAL = Dialect(
    name=routes.API,
    prefixes=PATHS,
    routers=(routes.router,),
    error_response=error_response,
    tags={"fal": "fal's API: https://docs.fal.ai/model-endpoints."},
    webhooks={routes.API: views.compose},
    middleware=Hosts,
)
