"""The built-in engine against `model.generate` on the same weights: `python -m benchmarks.rollout`.

A tiny Qwen2 (hidden 128, 4 layers, vocabulary 8192, tied), 8 prompts of 32 tokens, 8 completions each, 32 new tokens;
both sample at temperature 1, interleaved, in one process. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_fast.attention.group_cache import GroupCache
from grpo_fast.engines.base import Sampling
from grpo_fast.engines.local import LocalEngine
from grpo_fast.models.head import head_of
from grpo_fast.run.allocator import keep_freed_memory

PROMPTS, PROMPT, GROUP, NEW, VOCAB = 8, 32, 8, 32, 8192


def tiny_qwen2() -> transformers.PreTrainedModel:
    """1.8M parameters, random."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def prompt_bytes(engine: LocalEngine, prompts: list[list[int]]) -> tuple[int, int]:
    """Bytes of the prompts' keys and values as the engine holds them, and with a copy for every completion."""
    with torch.no_grad():
        run = engine._run(head_of(engine.model), prompts, GROUP, Sampling(max_new_tokens=2), 0)
        run.advance()
    cache = run.cache
    assert isinstance(cache, GroupCache)
    held = sum(x.nbytes for kept in (cache.prompt_keys, cache.prompt_values) for x in kept.values())
    return held, held * GROUP


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the process, where others share the machine"
    )
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    keep_freed_memory()
    transformers.utils.logging.set_verbosity_error()
    reference = tiny_qwen2()
    engine = LocalEngine(copy.deepcopy(reference))
    ids = torch.randint(1, VOCAB, (PROMPTS, PROMPT))
    prompts, repeated = ids.tolist(), ids.repeat_interleave(GROUP, 0)

    def ours() -> None:
        completions = engine.generate(prompts, GROUP, Sampling(max_new_tokens=NEW), seed=1)
        assert sum(len(c.token_ids) for c in completions) == PROMPTS * GROUP * NEW

    def theirs() -> None:
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "min_new_tokens": NEW}
        out = reference.generate(repeated, attention_mask=torch.ones_like(repeated), **options)  # pyright: ignore
        assert out.shape == (PROMPTS * GROUP, PROMPT + NEW)

    clock = time.process_time if asked.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {"engine": [], "generate": []}
    contenders: list[tuple[str, Callable[[], None]]] = [("engine", ours), ("generate", theirs)]
    for repeat in range(asked.repeats + 1):
        for name, run in contenders:
            started = clock()
            run()
            if repeat:  # the first is warm-up
                seconds[name].append(clock() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    held, copied = prompt_bytes(engine, prompts)
    print(
        json.dumps(
            {
                "threads": asked.threads,
                "clock": "cpu" if asked.cpu_time else "wall",
                "median_s": medians,
                "ratio": medians["generate"] / medians["engine"],
                "prompt_kv_bytes": held,
                "prompt_kv_bytes_copied": copied,
                "samples_s": seconds,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
