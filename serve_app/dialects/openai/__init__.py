"""The OpenAI image API, and this server's jobs, which are submitted in its words."""
