"""Code that the engines of all families share. It does not use Ray."""
