"""The sizes of the released GLM-Image, for a memory plan without its files.

They are those of its configuration, which `tests/gpu/models.py` repeats. A test builds it without memory and
compares. `deployments.engines.acceleration.component_bytes` computes the work at the released size.
"""

from deployments.memory_plan import Footprint

FOOTPRINT = Footprint(
    prior={"vision_language_encoder": 10_114_245_632},
    decoder={"text_encoder": 218_222_720, "transformer": 6_926_882_880, "vae": 406_100_643},
    # Keys and values of 2 heads of 128 channels in each of 40 layers.
    cached_numbers=2 * 2 * 128 * 40,
    # On an H200, captured passes and buffers took 0.25 GB. The encoder computes to 0.4 GB for a source image
    # of 1024×1024.
    prior_work=600_000_000,
    # A request of 8192 tokens is an image of 2048×2048, or an edit of two sources of 1024×1024.
    short_sequence_length=8192,
    dit_work=15_500_000,
    dit_work_a_pixel=482.5,
    vae_work_a_pixel=3072.5,
    tile_side=1024,
    # Keys and values of 32 heads of 128 channels in each of 30 layers, for 16×16 pixels.
    source_numbers_a_pixel=2 * 32 * 128 * 30 / 16**2,
    # diffusers leaves embeddings and norms as they are.
    quantized_share=0.89,
)
