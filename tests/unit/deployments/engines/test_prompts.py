"""Quoted texts are found as GLM-Image's own pipeline finds them."""

from diffusers import GlmImagePipeline
from hypothesis import example, given
from hypothesis import strategies as st

from deployments.engines.prompts import quoted_texts


@given(st.text(alphabet="ab '\"“”「」\n", max_size=24))
@example("a dog's bone and a cat's toy")
@example("“ \"x\" ” 「'y'」")
def test_quoted_texts_are_upstreams_glyph_texts(prompt: str) -> None:
    (upstream,) = GlmImagePipeline.get_glyph_texts(None, prompt)
    assert quoted_texts(prompt) == upstream
