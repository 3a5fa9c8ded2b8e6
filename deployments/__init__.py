"""The model plane: Ray Serve deployments that run the models. It does not use HTTP."""
