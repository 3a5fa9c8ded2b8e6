"""The state of the stages: loading, unloading, status."""
