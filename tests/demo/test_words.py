"""Tests that the tokenizer reads people's words as the training's, and the training's as they are."""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import GlmImageProcessor

from deployments.config import ModelConfig
from deployments.engines.prompts import plain_text
from deployments.families.glm_image.checkpoint import DEMO
from tests.demo.by_hand import wishes
from tests.demo.conftest import CONFIG
from training.demo import model
from training.demo.scenes import COLOURS, SHAPES, random_edit, random_scene
from training.demo.words import LINKS, SYNONYMS

FILE = DEMO / "processor/tokenizer.json"
TOKENIZER = Tokenizer.from_file(str(FILE))
WORDS = sorted({word for wish in wishes() for word in wish.sentence.lower().split()})


@pytest.fixture(scope="module")
def loaded() -> Any:
    """Returns the tokenizer as the server loads it."""
    return GlmImageProcessor.from_pretrained(DEMO / "processor").tokenizer


def rewritten(prompt: str) -> str:
    text: str = TOKENIZER.normalizer.normalize_str(prompt)
    return text


def plain_tokenizer() -> Tokenizer:
    """Returns the tokenizer without the rules."""
    tokenizer = Tokenizer.from_file(str(FILE))
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def test_the_checkpoint_has_the_tokenizer_that_the_training_writes(tmp_path: Path) -> None:
    model.processor().save_pretrained(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        assert file.read_bytes() == (FILE.parent / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("make", "count"),
    [(random_scene, 2000), (lambda rng: random_edit(rng)[1], 500)],
    ids=["scenes", "edits"],
)
def test_a_sentence_of_the_training_keeps_its_tokens(
    make: Callable[[random.Random], Any], count: int
) -> None:
    rng, plain = random.Random("tests of the words"), plain_tokenizer()
    for _ in range(count):
        sentence = make(rng).sentence
        assert TOKENIZER.encode(sentence).ids == plain.encode(sentence).ids, sentence


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a tiny violet ball", "a small purple circle"),
        ("Show me a HUGE box, please!", "a large red square"),
        ("blue square, white background", "a blue square on a white background"),
        ("black background: one red disc", "on a black background, a red circle"),
        ("The circle is red and the background is white.", "a red circle on white."),
        ("a star coloured orange", "an orange star"),
        ("a little dot in the upper left-hand corner", "a small red circle in the top left corner"),
        ("a yellow box, lower right", "a yellow square at the bottom right"),
        ("a green star near the left edge", "a green star on the left"),
        ("a red ball next to a blue box", "a red circle left of a blue square"),
        ("a star over a circle", "a blue star over a red circle"),
        ("red circle and blue square", "a red circle left of a blue square"),
        ("two yellow stars", "a yellow star left of a yellow star"),
        ("red and blue circles", "a red circle left of a blue circle"),
        ("a red ball on the right and a blue ball on the left", "a red circle right of a blue circle"),
        ("at the top a red star, at the bottom a box", "a red star above a red square"),
        (
            "below a white star, a black square",
            "on a blue background, a white star above a black square",
        ),
        ("a large green triangle at the top left", "a green triangle at the top left"),
        ("a small star left of a big circle", "a small blue star left of a red circle"),
        ("A white square.", "on a blue background, a white square."),
        ("draw a white dot over a blue box", "on a green background, a white circle over a blue square"),
        ("a white star on black", "a white star on black"),
        ("change the background to green", "make the background green"),
        ("please colour the ball violet", "make the circle purple"),
        ("a castle in the fog", "a in the"),
        ("Lorem ipsum", ""),
    ],
)
def test_peoples_words_are_read_as_the_trainings(written: str, read: str) -> None:
    assert rewritten(written) == read


def test_each_word_of_the_configured_vocabulary_is_read() -> None:
    args = yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]
    vocabulary = ModelConfig.model_validate(args["models"][0]).vocabulary
    assert {*COLOURS, *SHAPES} < set(vocabulary)
    assert [word for word in vocabulary if not rewritten(word)] == []


def test_synonyms_are_of_words_of_the_training() -> None:
    rng = random.Random(0)
    sentences = [scene.sentence for _ in range(2000) for scene in (random_scene(rng), random_edit(rng)[1])]
    known = set(re.findall("[a-z]+", " ".join(sentences).lower()))
    assert known >= {word for words in SYNONYMS for word in words.split()}
    assert known.isdisjoint(LINKS)


def test_sizes_of_grids_and_control_tokens_are_read_as_they_are() -> None:
    plain = plain_tokenizer()
    for text in ("<sop>16 16<eop>", "<sop>24 16<eop><sop>19 13<eop><|dit_token_2024|>"):
        assert TOKENIZER.encode(text).ids == plain.encode(text).ids


@settings(deadline=None)
@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4), st.just("<|image|>"))).map(" ".join))
def test_any_prompt_is_read(loaded: Any, prompt: str) -> None:
    """A rule that matched an empty string would panic."""
    ids = loaded(plain_text(loaded, prompt)).input_ids
    assert loaded.added_tokens_decoder.keys().isdisjoint(ids)


@pytest.mark.parametrize(
    "words",
    ["yellow", "star", "big", "the", ".", "a red circle,", "left of", "on the left", "red and", "of", "of ,"],
)
def test_a_long_prompt_takes_no_long_time(words: str) -> None:
    """Without the limit of the rules' searches, some take ten seconds and more."""
    began = time.process_time()
    rewritten(f"{words} " * (32_000 // (len(words) + 1)) + "star")
    assert time.process_time() - began < 3
