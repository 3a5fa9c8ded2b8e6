"""The model plane: Ray Serve deployments that run the models. Knows no HTTP."""
