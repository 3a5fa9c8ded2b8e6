"""HTTP: the application, its middleware, keys, streams and the OpenAPI document."""
