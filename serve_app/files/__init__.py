"""The file store, and uploads to it."""
