"""Generation in the training process, on the very weights that are trained: nothing to copy or to synchronise.

`run.py` schedules prompts and rows, `decoder.py` is one step of all rows, and the keys and values lie in one of the
caches of `grpo_fast.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_fast.attention.function import use_packed_attention
from grpo_fast.attention.group_cache import GroupCache
from grpo_fast.attention.paged_cache import PagedCache, pages_of
from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.engines.base import Completion, Sampling, check_request, evaluating, places_of
from grpo_fast.engines.decoder import Decoder
from grpo_fast.engines.graphs import Capture, CudaCapture, StepGraphs
from grpo_fast.engines.readback import results_later
from grpo_fast.engines.run import Run
from grpo_fast.engines.stops import Decode
from grpo_fast.errors import UserError
from grpo_fast.models.head import HeadSpec, head_of
from grpo_fast.models.lora import merged_adapters

Progress = Callable[[int, int, int], None]
"""Called with (completions done, completions in all, tokens so far) after every step."""
PROMPT_STEP = 256
"""Longest prompts are rounded up to a multiple of this, so that a slightly longer one does not make all graphs anew."""


class LocalEngine:
    """A `RolloutEngine` over a transformers model in place. Raises `UserError` for a model that cannot be
    packed.

    At most `max_rows` completions decode at once and at most `prefill_tokens` prompt tokens are prefilled at
    once (a longer prompt alone), so memory is bounded whatever is asked for. A completion depends on the
    weights, its prompt, the sampling and (seed, prompt index, sample index) alone, up to the rounding of
    matrix products of different sizes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_rows: int = 256,
        prefill_tokens: int = 16384,
        settings: EngineSettings | None = None,
        decode: Decode | None = None,
    ) -> None:
        """`decode` turns token ids into text; only stop strings need it.

        On a CUDA device keys and values lie in pages, which like the captured graphs are kept from call to call until
        `sleep`. On the CPU they are dense and freed with each call, except in 8 bits.
        """
        if max_rows < 1:
            raise UserError(f"max_rows must be at least 1, got {max_rows}")
        self.model = use_packed_attention(model)
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.settings = settings or EngineSettings()
        self.decode = decode
        self.version = 0
        on_cuda = self.model.device.type == "cuda"
        self._paged = on_cuda or self.settings.kv_dtype == "fp8"
        self._behind = int(on_cuda)  # the host reads one step's tokens while the device works on the next
        graphs = on_cuda and self.settings.cuda_graphs != "off"
        self._capture: Callable[[], Capture] | None = CudaCapture if graphs else None
        self._held: Decoder | None = None
        self._graphs: StepGraphs | None = None

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        *,
        places: Sequence[int] | None = None,
        on_progress: Progress | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """`n` completions of every prompt, group-major; `on_group` sees each group as soon as it is whole.

        Raises `UserError` for an empty prompt or a token outside the vocabulary, `FloatingPointError` when
        the model returns logits that are no distribution.
        """
        head = head_of(self.model)
        check_request(prompts, n, head.weight.shape[0])
        if sampling.stop_strings and self.decode is None:
            raise UserError("stop_strings need the tokenizer: give the engine its decode")
        if not prompts:
            return []
        with evaluating(self.model), torch.no_grad(), self._merged():
            run = self._run(head, prompts, n, sampling, seed, places_of(prompts, places))
            while run.unfinished:
                run.advance()
                if on_group is not None:
                    for prompt in run.take_whole():
                        on_group(prompt, [run.completion(prompt, s, self.version) for s in range(n)])
                if on_progress is not None:
                    on_progress(len(run.done), len(prompts) * n, run.tokens)
        if self.settings.sleep:
            self.sleep()
        return [run.completion(p, s, self.version) for p in range(len(prompts)) for s in range(n)]

    def _merged(self) -> AbstractContextManager[None]:
        if not self.settings.merge_lora:
            return nullcontext()
        return merged_adapters(self.model, on_host=self.settings.merge_copies == "host")

    def _run(
        self,
        head: HeadSpec,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        places: Sequence[int],
    ) -> Run:
        rows = min(self.max_rows, len(prompts) * n)
        if self._paged:
            decoder = self._held_decoder(head, rows, max(map(len, prompts)), sampling.max_new_tokens, n)
        else:
            cache = GroupCache(rows, head.weight.device)
            decoder = Decoder(self.model, head, cache, max_rows=rows, max_new_tokens=sampling.max_new_tokens)
        step = decoder.step if self._graphs is None else self._graphs.step
        return Run(
            decoder,
            results_later(lambda count: step(count, sampling), rows, self._behind, head.weight.device),
            prompts,
            n,
            sampling,
            seed,
            places=places,
            max_rows=rows,
            prefill_tokens=self.prefill_tokens,
            layers=self.model.config.get_text_config(decoder=True).num_hidden_layers,
            behind=self._behind,
            decode=self.decode,
        )

    def _held_decoder(self, head: HeadSpec, rows: int, prompt: int, new: int, n: int) -> Decoder:
        """The decoder of pages and graphs that is kept from call to call, made larger when a call needs that."""
        held, graphs = self._held, self._graphs
        prompt = -(-prompt // PROMPT_STEP) * PROMPT_STEP
        # stragglers keep their groups' prompts: twice the groups that fill the rows, but never more than rows
        prompts = min(rows, 2 * -(-rows // n) + 1)
        if held is not None:
            assert isinstance(held.cache, PagedCache)
            enough = prompts * pages_of(prompt) + rows * pages_of(new) < held.cache.count
            fits = rows <= held.max_rows and prompt <= held.cache.max_prompt and new <= held.max_new_tokens
            if not (enough and fits and held.head.weight.device == head.weight.device):
                rows, new = max(rows, held.max_rows), max(new, held.max_new_tokens)
                prompt = max(prompt, held.cache.max_prompt)
                held = None
        if held is None:
            self.sleep()
            cache = PagedCache(
                rows,
                head.weight.device,
                max_prompt=prompt,
                max_new_tokens=new,
                prompts=prompts,
                fp8=self.settings.kv_dtype == "fp8",
            )
            held = Decoder(self.model, head, cache, max_rows=rows, max_new_tokens=new)
            self._held = held
            if self._capture is not None:
                graphs = self._graphs = StepGraphs(held, self._capture())
        assert isinstance(held.cache, PagedCache)
        held.head = head
        held.cache.clear()
        if graphs is not None:
            graphs.check_weights(self.model)
        return held

    def memory(self) -> int:
        """Bytes of keys and values held between calls."""
        return 0 if self._held is None else self._held.cache.nbytes

    def push(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Note the version; the weights are the trainer's own."""
        self.version = version

    def sleep(self) -> None:
        """Give back the graphs and the keys and values that CUDA keeps between calls; the CPU keeps none."""
        self._held = self._graphs = None

    def wake(self) -> None:
        """Nothing: what is needed is made by the next `generate`."""

    def close(self) -> None:
        """The same as `sleep`."""
        self.sleep()
