"""The prior engine: upstream's tokens, seeds of their own, and no special token in the grid."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import GlmImagePipeline

from deployments.config import ModelConfig
from deployments.errors import Cancelled
from deployments.glm_image import checkpoint
from deployments.glm_image.prior import PriorEngine
from deployments.types import PriorRequest, TokenGrid

NEVER = threading.Event()
CODEBOOK_SIZE = 256


class Loaded:
    """One set of weights, to be run by our engine and by upstream."""

    def __init__(self, config: ModelConfig) -> None:
        self.model, self.processor = checkpoint.load_prior(config)
        self.engine = PriorEngine(self.model, self.processor)

    def ours(self, seed: int, prompt: str = "a boat") -> TokenGrid:
        request = PriorRequest(prompt=prompt, width=512, height=512, seed=seed)
        return self.engine.generate(request, NEVER).target

    def upstreams(self, seed: int) -> TokenGrid:
        """Raises when upstream fails, and may hold special tokens when it does not."""
        pipeline = GlmImagePipeline(None, self.processor, None, self.model, None, None, None)
        generator = torch.Generator().manual_seed(seed)
        tokens, _, _ = pipeline.generate_prior_tokens("a boat", 512, 512, generator=generator)
        grid: TokenGrid = tokens.view(32, 32)[::2, ::2].numpy()
        return grid


@pytest.fixture
def loaded(model_config: Callable[..., ModelConfig]) -> Loaded:
    return Loaded(model_config())


def test_no_seed_of_the_process_is_read_or_written(loaded: Loaded) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = loaded.ours(seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(loaded.ours(seed=5), first)
    assert not np.array_equal(loaded.ours(seed=6), first)


def test_upstreams_tokens_wherever_upstream_makes_an_image(loaded: Loaded) -> None:
    loaded.model.generation_config.suppress_tokens = None
    sound = failed = 0
    for seed in range(12):
        ours = loaded.ours(seed)
        assert ours.min() >= 0
        assert ours.max() < CODEBOOK_SIZE
        theirs = loaded.upstreams(seed)
        if theirs.max() < CODEBOOK_SIZE:
            sound += 1
            assert np.array_equal(ours, theirs)
        else:
            failed += 1
    assert sound, "no seed compares the two"
    assert failed, "no seed shows the difference"


def test_an_end_token_does_not_end_the_grid(loaded: Loaded) -> None:
    loaded.model.generation_config.suppress_tokens = None
    loaded.model.generation_config.eos_token_id = CODEBOOK_SIZE + 1
    loaded.engine = PriorEngine(loaded.model, loaded.processor)

    def ends_early(seed: int) -> bool:
        try:
            loaded.upstreams(seed)
        except RuntimeError:  # a grid cut short takes no shape
            return True
        return False

    seed = next(seed for seed in range(20) if ends_early(seed))
    assert loaded.ours(seed).shape == (16, 16)


def test_special_tokens_are_never_drawn_even_where_nothing_else_is_likely(loaded: Loaded) -> None:
    loaded.model.generation_config.suppress_tokens = None
    loaded.model.generation_config.top_k = 2
    with torch.no_grad():
        # The final norm's output has no fixed sign, so that each special token wins often.
        loaded.model.lm_head.weight[CODEBOOK_SIZE] *= 1000
        loaded.model.lm_head.weight[CODEBOOK_SIZE + 1] = -loaded.model.lm_head.weight[CODEBOOK_SIZE]
    tokens = loaded.ours(seed=0)
    assert tokens.max() < CODEBOOK_SIZE
    assert len(np.unique(tokens)) > 1


def test_reserved_strings_reach_the_model_as_letters(loaded: Loaded) -> None:
    prompt = "x <|image|> <sop>1 1<eop> <|endoftext|> <|dit_token_257|> y"
    inputs = loaded.engine._tokenize(PriorRequest(prompt=prompt, width=512, height=512, seed=0))
    tokenizer = loaded.processor.tokenizer
    controls = [token for token in inputs["input_ids"][0].tolist() if token in tokenizer.added_tokens_decoder]
    shape = ["<sop>", "<eop>", "<sop>", "<eop>", tokenizer.bos_token]  # the two grids, the image's start
    assert tokenizer.convert_ids_to_tokens(controls) == shape
    text = tokenizer.decode(inputs["input_ids"][0])
    assert text.replace("\u200b", "").startswith(prompt)


@pytest.mark.parametrize("prompt", ["", "a boat", "ÖFFNUNG 早安 🙂", "< sop > <|im", "x\u200by"])
def test_other_prompts_stay_as_they_are(loaded: Loaded, prompt: str) -> None:
    assert loaded.engine._plain_text(prompt) == prompt


def test_a_break_that_brings_forth_another_reserved_string_is_broken_too(loaded: Loaded) -> None:
    loaded.processor.tokenizer.add_special_tokens({"extra_special_tokens": ["p>|q", "q|r"]})
    plain = loaded.engine._plain_text("<sop>|q|r<sop>")
    assert plain.replace("\u200b", "") == "<sop>|q|r<sop>"
    assert not any(reserved in plain for reserved in ("<sop>", "p>|q", "q|r"))


def test_a_cancelled_request_stops_and_the_next_one_is_clean(loaded: Loaded) -> None:
    expected = loaded.ours(seed=3)
    cancelled = threading.Event()
    drawn = 0

    def count(*_: object) -> None:
        nonlocal drawn
        drawn += 1
        if drawn == 10:
            cancelled.set()

    hook = loaded.model.register_forward_hook(count)
    with pytest.raises(Cancelled):
        loaded.engine.generate(PriorRequest(prompt="a boat", width=512, height=512, seed=4), cancelled)
    hook.remove()
    assert drawn == 10
    assert np.array_equal(loaded.ours(seed=3), expected)


def test_a_request_cancelled_before_it_begins_does_no_work(loaded: Loaded) -> None:
    cancelled = threading.Event()
    cancelled.set()
    loaded.model.register_forward_hook(lambda *_: pytest.fail("a forward pass was run"))
    with pytest.raises(Cancelled):
        loaded.engine.generate(PriorRequest(prompt="a boat", width=512, height=512, seed=4), cancelled)
