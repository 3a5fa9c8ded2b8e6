r"""The tokenizer's normalizer: it rewrites what people write as the sentences that the demo is trained on.

A sentence of the training passes unchanged. A rule is a regular expression of Oniguruma and a literal text.
The text replaces the match, or the part of it after `\K`. No rule may match an empty string, because
`tokenizers` panics then. Every search has a limit, because prompts can be long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Regex, normalizers

from training.demo.scenes import COLOURS, SHAPES, SIZES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Rule = tuple[str, str]

SYNONYMS = {
    "circle": ("balls?", "dis[ck]s?", "dots?", "circles"),
    "square": ("box(?:es)?", "cubes?", "blocks?", "squares"),
    "triangle": ("pyramids?", "triangles"),
    "star": ("stars",),
    "red": ("crimson", "scarlet"),
    "yellow": ("golden",),
    "purple": ("violet", "lilac"),
    "small": ("tiny", "little", "mini"),
    "large": ("huge", "giant", "enormous"),
    "background": ("backdrop",),
    "top": ("upper",),
    "bottom": ("lower",),
    "in the middle": ("centered", "centred"),
    "on": ("in front of",),
    "on top of": ("atop",),
    "beneath": ("underneath",),
    "left of": ("next to", "beside", "alongside"),
    "make": ("(?:change|(?:re)?colou?r)(?= the )",),
}
"""Words that people use, as regular expressions, by the words of the training."""

LINKS = ("and", "is", "into", "one", "two")
"""Words outside the training that rules about the order of words need. They are dropped last."""

OPPOSITES = (
    ("left", "left of", "right", "right of"),
    ("right", "right of", "left", "left of"),
    ("top", "above", "bottom", "below"),
    ("bottom", "below", "top", "above"),
)
"""A place, the relation of an object there to one at the opposite place, and both for the opposite place."""

DEFAULT_COLOURS = ("red", "blue")
"""Colours of an object without one. The second is for an object before a red one."""

DEFAULT_BACKGROUNDS = ("blue", "green")
"""Backgrounds of a white object without one, which is not seen on white. The second is beside a blue one."""


def _any(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(words)})"


COLOUR, SHAPE, SIZE = _any(COLOURS), _any(SHAPES), _any((*SIZES, "big"))
THING = rf"(?:{SIZE} )?(?:{COLOUR} )?{SHAPE}\b"
A_THING = f"an? {THING}"
RELATION = "(?:above|below|over|under|beneath|on top of|(?:to the )?(?:left|right) of)"
ELSEWHERE = "(?:top|bottom|left|right|above|below|over|under|beneath)"
"""Words for a place other than the middle."""
NEARBY = ".{0,80}"


def normalizer(known: Iterable[str]) -> normalizers.Normalizer:
    """Returns the normalizer.

    Args:
        known: words of the training. Any other word that no rule reads is dropped.
    """
    replacements = [normalizers.Replace(Regex(pattern), text) for pattern, text in _rules(frozenset(known))]
    return normalizers.Sequence([normalizers.Lowercase(), *replacements])


def _rules(known: frozenset[str]) -> Iterator[Rule]:
    yield from _punctuation()
    yield from _synonyms()
    yield from _dropped({*known, *LINKS})
    yield from _edits()
    yield from _articles()
    yield from _backgrounds()
    yield from _places()
    yield from _colours()
    yield from _pairs()
    yield from _sizes()
    yield from _dropped(known)
    yield from _beginnings()
    yield from _white_objects()


def _punctuation() -> Iterator[Rule]:
    """Yields rules that leave letters, digits, spaces, commas, and a full stop at the end."""
    yield "[;:]", ","
    yield r"[^\p{L}\p{N},.]+", " "
    yield r"\.(?= ?\p{L})", ","


def _synonyms() -> Iterator[Rule]:
    yield rf"\bround (?:{COLOUR} )?\K(?:shape|thing|object)\b", "circle"
    for word, others in SYNONYMS.items():
        yield rf"\b{_any(others)}(?!\p{{L}})", word


def _dropped(known: Iterable[str]) -> Iterator[Rule]:
    """Yields rules that drop all other words, and the spaces and commas that are left then."""
    yield rf"\b(?!{_any(sorted(known))}\b)\p{{L}}+\b", ""
    yield " {2,}", " "
    yield " +(?=[,.])", ""
    yield ",+(?=[,.])", ""
    yield "^[ ,.]+", ""
    yield "(?:[ ,]| (?:in|of|on|with)){1,8}$", ""


def _edits() -> Iterator[Rule]:
    yield rf"\bthe (?:{COLOUR} )?(?:{SHAPE}|background)\K (?:to|into) (?={COLOUR}\b)", " "
    yield r"\b(?:make|turn|to) (?!the\b)", ""


def _articles() -> Iterator[Rule]:
    yield rf"(?<!make |paint |turn )\bthe (?={THING})", "a "
    yield rf"\bone (?={THING})", "a "
    yield rf"\b(?:on|against|with|{RELATION})\K (?={THING}|{COLOUR} background)", " a "


def _backgrounds() -> Iterator[Rule]:
    yield rf"\b(?:center|centre|middle) \Kof (?=an? {COLOUR} background)", "on "
    yield rf"(?:,? and|,) (?:the )?background,?(?: is)? (?={COLOUR}\b)", " on "
    yield rf"^(?:the )?background,?(?: is)? (?={COLOUR}\b)", "on "
    yield rf"(?:,? and|,) (?:a )?(?={COLOUR} background)", " on a "
    for colour in COLOURS:
        yield rf"^(?:an? )?{colour} background", f"on a {colour} background"


def _places() -> Iterator[Rule]:
    yield " (?:of|in|on) the (?:picture|image)", ""
    yield rf"\b{SHAPE}\K,(?= (?:in|on|at|near) the )", ""
    for side in ("left", "right"):
        for end in ("top", "bottom"):
            yield rf"\b{side} {end}\b", f"{end} {side}"
            yield rf"\b(?:{SHAPE}|background)\K,? {end} {side} corner", f" in the {end} {side} corner"
            yield rf"(?:,| (?:in|on)(?: the)?) {end} {side}\b(?! corner)", f" at the {end} {side}"
        yield rf"(?:,| (?:in|near) the) {side}\b(?: side)?(?! of)", f" on the {side}"
    for end in ("top", "bottom"):
        yield rf", {end}\b(?! of)", f" at the {end}"


def _colours() -> Iterator[Rule]:
    """Yields rules that put a colour before its shape, and give a shape without a colour one."""
    begin = rf"(?:^|\b(?:an?|{SIZE}) |, )\K"
    for shape in SHAPES:
        yield rf"\b{COLOUR}\K and (?={COLOUR} {shape}\b)", f" {shape} and a "
        for colour in COLOURS:
            yield rf"{begin}{shape}(?:,|,? is| in)? {colour}\b(?! background)", f"{colour} {shape}"
        first, second = DEFAULT_COLOURS
        yield rf"{begin}{shape}\b(?!{NEARBY}\b{first}\b)", f"{first} {shape}"
        yield rf"{begin}{shape}\b", f"{second} {shape}"


def _pairs() -> Iterator[Rule]:
    """Yields rules that make a relation of the places of two objects."""
    for colour in COLOURS:
        for shape in SHAPES:
            yield rf"\btwo {colour} {shape}\b", f"a {colour} {shape} and a {colour} {shape}"
    yield rf"\b{SHAPE}\K(?:,? is|,) (?={RELATION} )", " "
    for place, relation, opposite, inverse in OPPOSITES:
        here, there = (rf"(?:on|at) the {one}(?: side)?" for one in (place, opposite))
        yield rf"\b{THING}\K {here}(?:,? and|,) (?={A_THING} {there})", f" {relation} "
        yield rf" {relation} {A_THING}\K {there}\b", ""
        yield rf"^{here},? {A_THING}\K(?:,? and|,)? {there},? (?={A_THING})", f" {relation} "
        yield rf"^{here},? (?={A_THING} {relation} )", ""
        yield rf"^(?:to the )?{relation} {A_THING}\K(?:,? is|,) (?={A_THING})", f" {inverse} "
        yield rf"^(?:to the )?{relation} (?={A_THING} {inverse} )", ""
    yield rf"\b{SHAPE}\K(?:,? and|,) (?={A_THING})", " left of "
    yield rf"\b{SHAPE}\K(?:,? and|,) (?={THING})", " left of a "


def _sizes() -> Iterator[Rule]:
    """Yields rules that drop the word large where no object of the training is large: not in the middle."""
    yield rf"\b(?:large|big) (?={NEARBY}\b{ELSEWHERE}\b)", ""
    yield rf"\b{ELSEWHERE}\b{NEARBY}\K\b(?:large|big) ", ""


def _beginnings() -> Iterator[Rule]:
    """Yields rules that give a sentence its first article, and correct others."""
    for word in (*COLOURS, *SIZES, "big", *SHAPES):
        yield rf"^{word}\b", f"a {word}"
    yield r"\ba (?=orange\b)", "an "
    yield r"\ban (?!orange\b|image\b)", "a "


def _white_objects() -> Iterator[Rule]:
    begin = r"^(?:(?:draw|paint) |an? (?:picture|image) of )?an? "
    anywhere = ".{0,160}"
    background = rf"(?:background\b|(?:on|against|with) (?:an? )?{COLOUR}\b(?! {SHAPE}))"
    first, second = DEFAULT_BACKGROUNDS
    for colour, other in ((first, first), (second, background)):
        yield (
            rf"{begin}(?!{anywhere}\b{background})(?!{anywhere}\b{other})(?={anywhere}\bwhite {SHAPE}\b)",
            f"on a {colour} background, a ",
        )
