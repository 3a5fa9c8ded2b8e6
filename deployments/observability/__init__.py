"""Metrics, logs and traces of the model plane."""
