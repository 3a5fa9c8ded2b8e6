"""One module an API: its routes, schemas and error envelope, and nothing else."""
