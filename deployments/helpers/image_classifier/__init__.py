"""The classifier of the safety checker, which scores images. It does not use Ray."""
