"""Trains the demo checkpoint."""
