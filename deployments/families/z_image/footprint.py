"""The sizes of the released Z-Image and Z-Image-Turbo, for a memory plan without their files.

They are those of the released configuration: diffusers' defaults for the DiT, Qwen3-4B and FLUX's VAE. A test
builds it without memory and compares. `deployments.engines.acceleration.component_bytes` computes the work.
Nothing of it was measured on a GPU.
"""

from deployments.memory_plan import Footprint

FOOTPRINT = Footprint(
    prior={"text_encoder": 4_022_468_096},
    decoder={"transformer": 6_154_908_736, "vae": 83_819_683},
    prior_work=100_000_000,  # a pass of two texts of 512 tokens computes to 0.08 GB
    dit_work=127_000_000,
    dit_work_a_pixel=948.6,
    vae_work_a_pixel=1536.5,
    tile_side=1024,
    quantized_share=0.998,  # diffusers leaves embeddings and norms as they are
)
