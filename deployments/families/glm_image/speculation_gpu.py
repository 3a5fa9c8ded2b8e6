"""Speculation on an accelerator: drafts, noise and the comparison stay on the device, at fixed shapes.

It is the iteration of `speculation`, with a window of one size. The host learns later how many tokens a pass
has settled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from deployments.families.glm_image.cuda_graphs import MAX_AHEAD, set_without_waiting
from deployments.families.glm_image.speculation import INITIAL_RATE, RATE_DECAY, rules, source_tokens

if TYPE_CHECKING:
    from deployments.families.glm_image.sequence import Sequence


RULES = 3
"""Most rules by which the tokens of a request are guessed."""


class Lines(NamedTuple):
    """The lines of a pass: a window for each row.

    Attributes:
        tokens: ids to be read: shape (rows, window).
        positions: their rotary positions: shape (3, rows, window).
        starts: indices in the row at which they are written: shape (rows, window).
        noise: noise of the tokens to be drawn: shape (rows, window, vocabulary), float32.
        in_target: whether these belong to the target grid: shape (rows, window), bool.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    noise: torch.Tensor
    in_target: torch.Tensor


class RowTokens(nn.Module):
    """The tokens of all rows: those that are settled, and drafts of the next ones.

    Args:
        rows: number of rows.
        window: number of tokens of a row that a pass draws.
        length: number of tokens that a row may draw.
        vocabulary: number of tokens to choose from.
        device: device of all tensors.

    Attributes:
        tokens: ids by order of drawing, then those of a source image at the places of these: shape (rows,
            2 × (length + window)).
        settled: number of settled tokens of each row: shape (rows,).
    """

    def __init__(self, *, rows: int, window: int, length: int, vocabulary: int, device: torch.device) -> None:
        super().__init__()

        def buffer(*shape: int, dtype: torch.dtype = torch.long) -> nn.Buffer:
            return nn.Buffer(torch.zeros(shape, dtype=dtype, device=device), persistent=False)

        self._end = length + window
        self.tokens = buffer(rows, 2 * self._end)
        self.settled = buffer(rows)
        # Tokens from this index on have not been drawn in any pass.
        self.known = buffer(rows)
        # For each rule: the index of the token that a token is guessed from, and its recent rate of success.
        self.rules = buffer(RULES, rows, length + window)
        self.rates = buffer(RULES, rows, dtype=torch.float32)
        self.positions = buffer(3, rows, length + window)
        # Number of tokens in the prompt, to be drawn, and to be drawn before the target grid.
        self.counts = buffer(3, rows)
        # For each row: whether it draws, and the index of the next token of its prompt.
        self.states = buffer(2, rows)
        # Between the settled tokens that the host knows and the last one that a pass draws lie the windows of
        # the passes under way and of the pass to be enqueued. Noise of token n is at n modulo this length.
        self.noise = buffer(rows, MAX_AHEAD * window, vocabulary, dtype=torch.float32).fill_(1)
        self.steps = nn.Buffer(torch.arange(window, device=device), persistent=False)

    def begin(self, row: int, sequence: Sequence, source: torch.Tensor | None) -> None:
        """Prepares a row for a request, without waiting."""
        prompt, drawn = len(sequence.prompt), sequence.drawn
        # A window may end after the last token. What it draws there is never read.
        beyond = range(drawn - 1, drawn - 1 + len(self.steps))
        found = rules(sequence.grids, None if source is None else self._end)
        # The first token is drawn without a draft, so nothing is above it.
        indices = torch.tensor([[*rule, *beyond] for rule in found]).clamp(min=0)
        for i in range(RULES):  # where there are fewer, the last one is there several times
            set_without_waiting(self.rules[i, row, : indices.shape[1]], indices[min(i, len(found) - 1)])
        self.rates[:, row].fill_(INITIAL_RATE)
        if source is not None:
            tokens = torch.tensor(source_tokens(source, sequence.grids))
            set_without_waiting(self.tokens[row, self._end : self._end + drawn], tokens)
        positions = sequence.positions[:, prompt : prompt + drawn]
        set_without_waiting(self.positions[:, row, :drawn], positions)
        counts = torch.tensor([prompt, drawn, sequence.before_target])
        set_without_waiting(self.counts[:, row], counts)

    def draw_noise(self, row: int, index: int, generator: torch.Generator) -> torch.Tensor:
        """Draws the noise of a row's token: shape (vocabulary,)."""
        noise: torch.Tensor = self.noise[row, index % self.noise.shape[1]]
        return noise.exponential_(generator=generator)

    def settle_first(self, row: int, token: torch.Tensor) -> None:
        """Takes a row's first token."""
        self.tokens[row, 0] = token
        # Assigning a number would copy it from the CPU, and wait.
        self.settled[row].fill_(1)
        self.known[row].fill_(1)

    def lines(self) -> Lines:
        """Returns the lines of the next pass. A row that does not draw has lines too.

        They are written where the next tokens of its prompt will be, or at its beginning.
        """
        prompt, _, before_target = self.counts
        following = self.settled[:, None] + self.steps
        at = (following - 1).clamp(min=0)
        # A token without a draft is guessed from another one, which may have no draft either.
        rule = self.rules[self.rates.argmax(dim=0), torch.arange(len(self.settled), device=at.device)]
        guessed_from = at
        for _ in range(len(self.steps) - 1):
            is_known = (guessed_from < self.known[:, None]) | (guessed_from >= self._end)
            guess = rule.gather(1, guessed_from.clamp(max=self._end - 1))
            guessed_from = torch.where(is_known, guessed_from, guess)
        draws, read = self.states
        first = torch.where(draws.bool(), prompt + self.settled - 1, read)
        rows = torch.arange(len(self.settled), device=self.settled.device)[:, None]
        return Lines(
            tokens=self.tokens.gather(1, guessed_from),
            positions=self.positions[:, rows, at],
            starts=first[:, None] + self.steps,
            noise=self.noise[rows, following % self.noise.shape[1]],
            in_target=following >= before_target[:, None],
        )

    def settle(self, read: torch.Tensor, drawn: torch.Tensor) -> None:
        """Takes the tokens of a pass, and settles the first and each that follows a right draft.

        Args:
            read: ids that the pass read: shape (rows, window).
            drawn: id that it drew after each of them, or `UNSOUND`: shape (rows, window).
        """
        right = 1 + (drawn[:, :-1] == read[:, 1:]).long().cumprod(dim=1).sum(dim=1)
        # What a row that does not draw gets here is overwritten before it is read.
        rows = torch.arange(len(self.settled), device=self.settled.device)[:, None]
        indices = self.settled[:, None] + self.steps
        self.tokens[rows, indices] = drawn
        self.known.copy_(self.settled + len(self.steps))
        count = self.states[0] * right.minimum(self.counts[1] - self.settled)
        self.settled.add_(count)
        # Each rule is judged by the tokens that have just been settled.
        were_right = self.tokens[rows, self.rules[:, rows, indices]] == drawn
        shares = (were_right & (self.steps < count[:, None])).sum(dim=-1) / count.clamp(min=1)
        past = RATE_DECAY**count
        self.rates.copy_(past * self.rates + (1 - past) * shares)
