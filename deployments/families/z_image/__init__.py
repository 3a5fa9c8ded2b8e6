"""The Z-Image family: checkpoint loading, the text encoder, the decoder and a tiny checkpoint."""
