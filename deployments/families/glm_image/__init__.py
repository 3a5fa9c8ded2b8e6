"""The GLM-Image family: checkpoint loading, the prior engine, the decoder and a tiny checkpoint."""
