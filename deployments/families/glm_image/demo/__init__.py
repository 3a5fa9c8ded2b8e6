"""The demo checkpoint: what it knows, and what trains it."""
