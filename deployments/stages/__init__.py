"""The Ray Serve deployments of the model plane."""
