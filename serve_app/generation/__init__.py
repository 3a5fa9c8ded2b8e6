"""Making images: requests, their validation and admission, and the path through the stages."""
