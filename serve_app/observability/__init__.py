"""Metrics, logs and traces of the API plane."""
