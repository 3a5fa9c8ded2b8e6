"""Speculation: several tokens of a request are drawn in one pass, and each is the token of its seed.

Each token has its own random noise, which does not depend on the tokens before it. So a pass can read
guesses of the next tokens ("drafts") and draw the token after each of them. While the drawn tokens equal the
drafts, everything that was read was right, and the tokens are settled. The first token that differs from its
draft is settled too, because all tokens before it were right. Those after it become the next drafts, and
their noise is kept. This is a Jacobi iteration: https://arxiv.org/abs/2305.10427. For image models it is
described in https://arxiv.org/abs/2410.01699, which draws new noise and so changes the tokens of a seed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from deployments.config import MAX_WINDOW

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Series

    from deployments.families.glm_image.sequence import Sequence

INITIAL_GROWTH = 0.6
"""See `RequestTokens.growth`. It was 0.5 with random weights, and 0.6 to 0.85 with the demo checkpoint."""

LEARNING_RATE = 0.03
"""How much of a pass's relative error is added to `RequestTokens.growth`."""

INITIAL_RATE = 0.7
"""Assumed rate of right guesses by a rule before it was tried."""

RATE_DECAY = 0.9
"""Weight of the past in a rule's rate. Each token that is settled has the rest of the weight."""

WORTHWHILE = 1.1
"""Drafts are read if they promise this many times the tokens a second. Predictions are not more exact."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A token that a decoding pass reads, and the token that it draws after it.

    Attributes:
        row: the request's row of the cache.
        start: index in the row at which the token is written.
        position: rotary position of the token, in time, row and column: shape (3,).
        token: id of the token to be read, or `UNSOUND`.
        noise: exponentially distributed noise of the token to be drawn: shape (vocabulary,), float32.
        in_target: whether the token to be drawn belongs to the target grid.
    """

    row: int
    start: int
    position: torch.Tensor
    token: int
    noise: torch.Tensor
    in_target: bool


class RequestTokens:
    """Tokens of one request: those that are settled, and drafts of the next ones.

    Args:
        sequence: the request's tokens and positions.
        row: its row of the cache.
        seed: its seed.
        vocabulary: number of tokens to choose from.
        source: tokens of its first source image: shape of `sequence.sources[0]`. None without one.

    Attributes:
        sequence: the request's tokens and positions.
        settled: ids drawn so far, or `UNSOUND`.
        growth: exponent, 0 to 1: lately a pass over `window` tokens has settled about `window ** growth`.
            Wide windows settle more than the first drafts promise, because their last drafts are drawn again
            and again before they come first.
    """

    def __init__(
        self,
        sequence: Sequence,
        row: int,
        seed: int,
        vocabulary: int,
        source: torch.Tensor | None = None,
    ) -> None:
        self.sequence = sequence
        self.settled: list[int] = []
        self.growth = INITIAL_GROWTH
        self._row = row
        self._generator = torch.Generator().manual_seed(seed)
        self._vocabulary = vocabulary
        self._rules = rules(sequence.grids, None if source is None else sequence.drawn)
        self._rates = [INITIAL_RATE] * len(self._rules)
        self._source = [] if source is None else source_tokens(source, sequence.grids)
        self._drafts: deque[int] = deque()
        self._noise: deque[torch.Tensor] = deque()

    @property
    def left(self) -> int:
        """Number of tokens to be drawn."""
        return self.sequence.drawn - len(self.settled)

    def noise(self, ahead: int = 0) -> torch.Tensor:
        """Returns the noise of the next token, or of one further ahead: shape (vocabulary,), float32."""
        while len(self._noise) <= ahead:  # the generator is used once for each token, in order
            self._noise.append(torch.empty(self._vocabulary).exponential_(generator=self._generator))
        return self._noise[ahead]

    def in_target(self, ahead: int = 0) -> bool:
        """Whether the next token, or one further ahead, belongs to the target grid."""
        return len(self.settled) + ahead >= self.sequence.before_target

    def lines(self, window: int) -> list[Line]:
        """Returns the lines of the next pass: one for the last settled token, and one for each draft."""
        window = min(window, self.left)
        first = len(self.sequence.prompt) + len(self.settled) - 1
        # There is always a draft, so that `growth` is known when the window is 1.
        while len(self._drafts) < max(window - 1, 1):
            self._drafts.append(self._draft())
        tokens = [self.settled[-1], *self._drafts]
        return [
            Line(
                row=self._row,
                start=first + i,
                position=self.sequence.positions[:, first + i],
                token=tokens[i],
                noise=self.noise(i),
                in_target=self.in_target(i),
            )
            for i in range(window)
        ]

    def settle(self, drawn: list[int]) -> None:
        """Takes the tokens drawn after each line, and settles the first and each that follows a right draft.

        The lines, or for the first token its noise, must have been read before.
        """
        right = 1
        for token, draft in zip(drawn, self._drafts, strict=False):
            if token != draft:
                break
            right += 1
        if self.settled:  # the first token has no draft
            self._observe(max(len(drawn), 2), right)
        right = min(right, len(drawn))
        self.settled += drawn[:right]
        if len(self.settled) > right:
            self._learn(right)
        for _ in range(right):
            self._noise.popleft()
        self._drafts = deque([*drawn[right:], *islice(self._drafts, len(drawn), None)])

    def _draft(self) -> int:
        """Returns a guess of the first token that has no draft yet, by the best rule."""
        rule = self._rules[self._rates.index(max(self._rates))]
        return self._token(rule[len(self.settled) + len(self._drafts)])

    def _observe(self, window: int, right: int) -> None:
        """Adapts `growth` to a pass. A window of 1 has a draft too, which tells of a window of 2."""
        error = min(right, window) / window**self.growth - 1
        self.growth = min(max(self.growth + LEARNING_RATE * error, 0.0), 1.0)

    def _learn(self, count: int) -> None:
        """Notes which rules would have been right about the last settled tokens."""
        past = RATE_DECAY**count
        for i, rule in enumerate(self._rules):
            indices = range(len(self.settled) - count, len(self.settled))
            right = sum(self._token(rule[index]) == self.settled[index] for index in indices)
            self._rates[i] = past * self._rates[i] + (1 - past) * right / count

    def _token(self, index: int) -> int:
        """Returns a token by its index in a rule: a settled one, a draft, or one of the source image."""
        if index >= self.sequence.drawn:
            return self._source[index - self.sequence.drawn]
        known = len(self.settled)
        return self.settled[index] if index < known else self._drafts[index - known]


class Windows:
    """Chooses how many tokens of each request a pass reads, so that most tokens a second are settled.

    The choice affects the speed only. Every token is the same in any window.

    Args:
        costs: seconds of a pass by its number of lines. No pass has more lines than the largest number,
            unless there are more requests. Empty if each request must have one line.
        fixed: window to use whatever it costs, or None.
    """

    def __init__(self, costs: Mapping[int, float], fixed: int | None = None) -> None:
        self._fixed = fixed if costs else None
        lines = np.arange(1, max(costs, default=1) + 1)
        # Noise only adds time: fewer lines cannot take longer than more.
        least = np.minimum.accumulate(list(costs.values())[::-1])[::-1]
        self._seconds = np.interp(lines, list(costs), least) if costs else np.ones(1)

    def choose(self, drawings: Series[RequestTokens]) -> list[int]:
        """Returns the window of each request."""
        if self._fixed:
            return [min(self._fixed, max(1, len(self._seconds) // len(drawings)))] * len(drawings)
        count, seconds = len(drawings), self._seconds[len(drawings) - 1 :]
        if len(seconds) < 2:
            return [1] * count
        ahead = np.arange(1, MAX_WINDOW)
        growth = np.array([one.growth for one in drawings])[:, None]
        gains = (ahead + 1) ** growth - ahead**growth
        gains[ahead >= np.array([one.left for one in drawings])[:, None]] = 0
        ranked = np.argsort(-gains, axis=None, kind="stable")[: len(seconds) - 1]
        rates = (count + np.cumsum(gains.flat[ranked])) / seconds[1 : 1 + len(ranked)]
        best = int(np.argmax(rates))
        if rates[best] < WORTHWHILE * count / seconds[0]:
            return [1] * count
        drafts = np.bincount(ranked[: best + 1] // len(ahead), minlength=count)
        windows: list[int] = (1 + drafts).tolist()
        return windows


def rules(grids: Series[tuple[int, int]], source_at: int | None) -> list[list[int]]:
    """Returns the rules by which a token is guessed from another one.

    A token resembles the one above it, the one at its place in the preview grid, or the one at its place in
    the source image. Which it resembles most depends on the picture.

    Args:
        grids: rows and columns of each grid, in order of drawing.
        source_at: index of the first of `source_tokens`, which follow the drawn tokens. None without them.

    Returns:
        Lists that have, for each token in order of drawing, the index of the token that it is guessed from.
        The first index of a list may be negative. It is never used: the first token has no draft.
    """
    found = [above(grids)]
    if len(grids) > 1:
        preview, *_, target = grids
        found.append(above(grids[:-1]) + at_the_same_place(preview, target))
    if source_at is not None:
        found.append(list(range(source_at, source_at + sum(rows * columns for rows, columns in grids))))
    return found


def above(grids: Series[tuple[int, int]]) -> list[int]:
    """Returns the index of the token above each token or, in a grid's first row, of the token before it."""
    indices: list[int] = []
    for rows, columns in grids:
        indices += [len(indices) + i - (columns if i >= columns else 1) for i in range(rows * columns)]
    return indices


def source_tokens(source: torch.Tensor, grids: Series[tuple[int, int]]) -> list[int]:
    """Returns the token at the place of each token to be drawn.

    Args:
        source: tokens of a source image: shape (rows, columns).
        grids: see `rules`.
    """
    rows, columns = source.shape
    places = chain.from_iterable(at_the_same_place((rows, columns), grid) for grid in grids)
    tokens: list[int] = source.flatten()[list(places)].tolist()
    return tokens


def at_the_same_place(grid: tuple[int, int], other: tuple[int, int]) -> list[int]:
    """Returns, for each place of another grid, the index of the token at that place of a grid."""
    (rows, columns), (other_rows, other_columns) = grid, other
    return [
        row * rows // other_rows * columns + column * columns // other_columns
        for row in range(other_rows)
        for column in range(other_columns)
    ]
