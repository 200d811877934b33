"""What happens in one `generate` call: who is prefilled, who decodes, who has ended.

Prompts are prefilled packed, each once for all its completions, and wait with their last hidden state until the last
of these has a row. A row that ends makes room at once, so ended completions cost nothing.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from grpo_fast.attention.plan import PrefillPlan
from grpo_fast.engines.base import Completion, Sampling
from grpo_fast.engines.decoder import Decoder
from grpo_fast.engines.sampling import draw, uniforms
from grpo_fast.engines.stops import Decode, StopStrings
from grpo_fast.errors import UserError

Stepper = Callable[[int], Callable[[], list[list[float]]]]
"""Starts a step of so many rows; what it returns waits for the tokens and log-probs."""


@dataclass
class _Row:
    """A completion under way."""

    prompt: int
    sample: int
    uniform: np.ndarray  # (max_new_tokens,) float64
    stops: StopStrings | None
    started: int = 0  # tokens whose step has been started; those of `tokens` and at most one a step in flight
    ended: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Run:
    """Completions waiting, decoding and done."""

    def __init__(
        self,
        decoder: Decoder,
        stepper: Stepper,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        *,
        places: Sequence[int],
        max_rows: int,
        prefill_tokens: int,
        layers: int,
        behind: int = 0,
        decode: Decode | None = None,
    ) -> None:
        """`places`: the prompts' numbers that random numbers are drawn from.

        `behind`: steps that may be in flight when the next one starts; a stop is then seen that much later.
        """
        self.decoder, self.stepper = decoder, stepper
        self.cache = decoder.cache
        self.prompts = prompts
        self.n = n
        self.sampling = sampling
        self.seed, self.places = seed, places
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.layers = layers
        self.behind = behind
        self.decode = decode
        self.device = decoder.token.device
        self.stops = frozenset(sampling.stop_token_ids)
        self.waiting = deque((p, s) for p in range(len(prompts)) for s in range(n))
        self.rows: list[_Row] = []
        self.flying: deque[tuple[list[_Row], Callable[[], list[list[float]]]]] = deque()
        self.hidden: dict[
            int, Tensor
        ] = {}  # of stored prompts, where their first tokens are drawn from: (H,)
        self.unplaced = Counter(dict.fromkeys(range(len(prompts)), n))  # samples of a prompt without a row
        self.in_rows: Counter[int] = Counter()  # rows of a prompt
        self.done: dict[tuple[int, int], _Row] = {}
        self.ended: list[int] = []  # the prompts of the completions that ended since `take_whole`
        self.ended_of: Counter[int] = Counter()
        self.tokens = 0

    @property
    def unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.waiting or self.rows or self.flying)

    def advance(self) -> None:
        """Prefill, or one more token for every row."""
        if self._should_admit():
            self._admit()
        elif self.rows:
            self._step()
        else:
            self._land()

    def _should_admit(self) -> bool:
        """Prefill when it fills a good part of the places at once; a prefill for every free place is slow."""
        if not self.waiting:
            return False
        free = self.max_rows - len(self.rows)
        return not self.rows or (free >= min(len(self.waiting), -(-self.max_rows // 4)) and self._fits([], 0))

    def _fits(self, used: list[int], rows: int) -> bool:
        """Whether the cache holds the next one waiting too, beside the prompts and rows this prefill already takes."""
        prompt = self.waiting[0][0]
        new = [] if prompt in self.hidden or prompt in used[-1:] else [prompt]
        return self.cache.room_for([len(self.prompts[p]) for p in [*used, *new]], rows + 1)

    def _admit(self) -> None:
        """Prefill the next prompts, draw the first token of their completions and give them rows."""
        fresh: list[_Row] = []
        used: list[int] = []  # prompts to prefill, in order
        total = 0
        while self.waiting and len(self.rows) + len(fresh) < self.max_rows and self._fits(used, len(fresh)):
            prompt, sample = self.waiting[0]
            if prompt not in self.hidden and (not used or used[-1] != prompt):
                if used and total + len(self.prompts[prompt]) > self.prefill_tokens:
                    break
                used.append(prompt)
                total += len(self.prompts[prompt])
            self.waiting.popleft()
            stops = None
            if self.sampling.stop_strings:
                assert self.decode is not None
                stops = StopStrings(self.sampling.stop_strings, self.decode)
            uniform = uniforms(self.seed, self.places[prompt], sample, self.sampling.max_new_tokens)
            fresh.append(_Row(prompt, sample, uniform, stops))
        if used:
            self._prefill(used)
        drawn_from = list(dict.fromkeys(row.prompt for row in fresh))
        logits = self.decoder.head.exact_logits(torch.stack([self.hidden[prompt] for prompt in drawn_from]))
        place = {prompt: i for i, prompt in enumerate(drawn_from)}
        which = torch.tensor([place[row.prompt] for row in fresh], device=self.device)
        streams = np.stack([row.uniform for row in fresh])
        first = torch.from_numpy(streams[:, 0].copy()).to(self.device)
        token, logprob = draw(logits[which], first, self.sampling)
        self._take(fresh, torch.stack([token.double(), logprob]).tolist())

        alive = [i for i, row in enumerate(fresh) if not row.ended]
        lengths = [len(self.prompts[fresh[i].prompt]) for i in alive]
        if alive:
            self.decoder.add(len(self.rows), token[alive], lengths, streams[alive])
            self.cache.add([fresh[i].prompt for i in alive])
        for row in fresh:
            row.started = 1
            self.unplaced[row.prompt] -= 1
        for i in alive:
            self.in_rows[fresh[i].prompt] += 1
            self.rows.append(fresh[i])
        for prompt in drawn_from:
            self._forget_if_unused(prompt)

    def _prefill(self, used: list[int]) -> None:
        lengths = [len(self.prompts[p]) for p in used]
        plan = PrefillPlan.of_lengths(lengths, self.device)
        ids = torch.tensor([[token for p in used for token in self.prompts[p]]], device=self.device)
        positions = torch.tensor([[i for length in lengths for i in range(length)]], device=self.device)
        last = torch.tensor(plan.q_starts[1:], device=self.device) - 1
        hidden = self.decoder.forward(ids, positions, plan)[0, last]  # (P, H)
        if len(plan.kept) != self.layers:
            name = type(self.decoder.base).__name__
            raise UserError(
                f"{name}: {len(plan.kept)} of {self.layers} layers pass their keys to the attention"
            )
        self.cache.store(used, plan)
        self.hidden.update(zip(used, hidden, strict=True))

    def _step(self) -> None:
        """One more token for every row, and the results of the step `behind` before it."""
        wait = self.stepper(len(self.rows))
        for row in self.rows:
            row.started += 1
        self.flying.append((self.rows, wait))
        if len(self.flying) > self.behind:
            self._land()
        limit = self.sampling.max_new_tokens
        alive = [i for i, row in enumerate(self.rows) if not row.ended and row.started < limit]
        if len(alive) < len(self.rows):
            self._close_ranks(alive)

    def _land(self) -> None:
        rows, wait = self.flying.popleft()
        self._take(rows, wait())

    def _close_ranks(self, alive: list[int]) -> None:
        """Move the last rows into the places of those that ended, so the rows in use stay the first ones."""
        count = len(alive)
        staying = set(alive)
        gone = [row for i, row in enumerate(self.rows) if i not in staying]
        holes = [i for i in range(count) if i not in staying]
        tails = [i for i in alive if i >= count]
        order = list(range(count))
        for hole, tail in zip(holes, tails, strict=True):
            order[hole] = tail
        self.decoder.keep(count, tails, holes)
        self.rows = [self.rows[i] for i in order]
        self.in_rows.subtract(row.prompt for row in gone)
        for prompt in dict.fromkeys(row.prompt for row in gone):
            self._forget_if_unused(prompt)

    def _forget_if_unused(self, prompt: int) -> None:
        if not self.unplaced[prompt]:
            self.hidden.pop(prompt, None)
            if not self.in_rows[prompt]:
                self.cache.drop(prompt)

    def _take(self, rows: list[_Row], drawn: list[list[float]]) -> None:
        """Append what was drawn to the rows that had not ended yet."""
        limit = self.sampling.max_new_tokens
        for row, token, logprob in zip(rows, *drawn, strict=True):
            if row.ended:
                continue
            if not math.isfinite(logprob):
                where = f"token {len(row.tokens)} of prompt {row.prompt}, sample {row.sample}"
                raise FloatingPointError(
                    f"the model's logits are not finite at {where}: weights with NaN or inf?"
                )
            self.tokens += 1
            row.tokens.append(int(token))
            row.logprobs.append(logprob)
            if row.tokens[-1] in self.stops or (
                row.stops is not None and row.stops.ends_with(row.tokens[-1])
            ):
                row.ended = "stop"
            elif len(row.tokens) == limit:
                row.ended = "length"
            if row.ended:
                self.done[row.prompt, row.sample] = row
                self.ended.append(row.prompt)

    def take_whole(self) -> list[int]:
        """Prompts whose completions have all ended, each reported once."""
        self.ended_of.update(self.ended)
        whole = [prompt for prompt in dict.fromkeys(self.ended) if self.ended_of[prompt] == self.n]
        self.ended = []
        return whole

    def completion(self, prompt: int, sample: int, version: int) -> Completion:
        """The finished completion (prompt, sample)."""
        row = self.done[prompt, sample]
        return Completion(
            token_ids=row.tokens,
            logprobs=torch.tensor(row.logprobs, dtype=torch.float32),
            finish_reason="stop" if row.ended == "stop" else "length",
            version=version,
        )
