"""One module a step. A released one is never changed: databases have taken it."""
