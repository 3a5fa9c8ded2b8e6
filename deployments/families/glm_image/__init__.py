"""GLM-Image: checkpoint loading, the prior engine, the decoder and a tiny checkpoint."""
