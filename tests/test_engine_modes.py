"""The engine's other ways: pages, steps in flight, captured steps, merged adapters, eight bits, stop strings.

CUDA alone uses pages and graphs by itself; here the same code runs on the CPU, with pages gathered by the plain twin
and a capture that runs the step again instead of replaying it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grpo_kernels import LossConfig, grpo_loss, linear_logprob
from transformers import AutoModelForCausalLM, GPT2Config

from grpo_fast.attention.group_cache import GroupCache
from grpo_fast.attention.paged import PAGE
from grpo_fast.config.engine_settings import EngineSettings
from grpo_fast.engines.base import Completion, Sampling
from grpo_fast.engines.graphs import StepGraphs, bucket_of
from grpo_fast.engines.local import LocalEngine
from grpo_fast.engines.stops import StopStrings
from grpo_fast.errors import UserError
from grpo_fast.miniature.tokenizer import build_tokenizer
from grpo_fast.models.head import head_of
from grpo_fast.models.lora import LoraSettings, add_lora
from tests.families import FAMILIES, VOCAB, packed_logprobs, ragged, tiny_model

PROMPTS = ragged(groups=5)[0]
STOPS = (3, 4, 5)
SAMPLING = Sampling(max_new_tokens=30, stop_token_ids=STOPS)


def texts(completions: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in completions]


def like_cuda(engine: LocalEngine, capture: Callable | None = None) -> LocalEngine:
    """Pages, one step in flight and captured steps, as on a CUDA device."""
    engine._paged, engine._behind = True, 1
    if capture is not None:
        engine._capture = lambda: capture
    return engine


def runs_again(run: Callable[[], object]) -> Callable[[], object]:
    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_pages_and_steps_in_flight_change_nothing(family: str) -> None:
    model = tiny_model(family)
    want = LocalEngine(model, max_rows=7).generate(PROMPTS, 3, SAMPLING, seed=1)
    got = like_cuda(LocalEngine(model, max_rows=7)).generate(PROMPTS, 3, SAMPLING, seed=1)
    assert texts(got) == texts(want)
    assert [c.finish_reason for c in got] == [c.finish_reason for c in want]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.logprobs, w.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen2"])
@pytest.mark.parametrize("paged", [False, True])
def test_long_completions_with_refill(family: str, paged: bool) -> None:
    """Several pages each, rows of many ages, a clock that is set back: log-probs stay the trainer's."""
    changes = {} if family == "qwen2" else {"sliding_window": 40}
    model = tiny_model(family, **changes)
    prompts = [[(7 * i + j) % 97 for j in range(length)] for i, length in enumerate((PAGE, 3, 80, 20))]
    sampling = Sampling(max_new_tokens=150, stop_token_ids=(3,))
    engine = LocalEngine(model, max_rows=5)
    if paged:
        like_cuda(engine)
    completions = engine.generate(prompts, 3, sampling, seed=2)
    lengths = [len(c.token_ids) for c in completions]
    assert max(lengths) > PAGE and min(lengths) < 40
    owner = [p for p in range(len(prompts)) for _ in range(3)]
    with torch.no_grad():
        want = packed_logprobs(model, prompts, texts(completions), owner, token_budget=600)
    for completion, expected in zip(completions, want, strict=True):
        torch.testing.assert_close(completion.logprobs, expected, atol=1e-4, rtol=0)


def test_a_prompt_is_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is prefilled once, though its completions do not fit the rows at the same time."""
    caches: list[GroupCache] = []
    store = GroupCache.store
    monkeypatch.setattr(GroupCache, "store", lambda self, *args: (caches.append(self), store(self, *args))[1])
    model = tiny_model("qwen2")
    prompts = [[5] * 40, [6] * 40]
    LocalEngine(model, max_rows=3).generate(prompts, 4, Sampling(max_new_tokens=4), seed=0)
    cache, count = caches[0], 0
    assert (
        len(caches) == 2
    )  # one prefill for each prompt: the second has no row yet when the first is computed
    for buffer in (*cache.prompt_keys.values(), *cache.prompt_values.values()):
        assert buffer.shape[0] <= 2 and buffer.shape[2] == 40
        count += buffer.nbytes
    per_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    assert count <= 2 * 40 * per_token
    assert cache.nbytes - count <= 3 * 64 * per_token


def test_captured_steps_draw_the_same() -> None:
    model = tiny_model("qwen2")
    want = LocalEngine(model, max_rows=13).generate(PROMPTS, 4, SAMPLING, seed=3)
    engine = like_cuda(LocalEngine(model, max_rows=13), runs_again)
    for _ in range(2):  # the second time with the graphs of the first
        assert texts(engine.generate(PROMPTS, 4, SAMPLING, seed=3)) == texts(want)
    graphs = engine._graphs
    assert graphs is not None and graphs.usable and len(graphs.replays) > 2
    kept = set(graphs.replays)
    with torch.no_grad():  # trained in place: the graphs hold
        model.base_model.layers[0].mlp.up_proj.weight.mul_(-1)
    changed = texts(engine.generate(PROMPTS, 4, SAMPLING, seed=3))
    assert changed == texts(LocalEngine(model).generate(PROMPTS, 4, SAMPLING, seed=3)) != texts(want)
    before = dict(graphs.replays)
    assert kept <= set(before)
    moved = model.base_model.layers[0].mlp.up_proj
    moved.weight.data = moved.weight.data.clone()
    engine.generate(PROMPTS, 4, SAMPLING, seed=3)
    assert all(graphs.replays[key] is not before[key] for key in kept & set(graphs.replays))
    assert engine.memory() > 0
    engine.sleep()
    assert engine.memory() == 0 and engine._graphs is None
    assert texts(engine.generate(PROMPTS, 4, SAMPLING, seed=3)) == changed


def test_a_larger_call_makes_the_buffers_larger() -> None:
    model = tiny_model("qwen2")
    engine = like_cuda(LocalEngine(model, max_rows=13), runs_again)
    engine.generate(PROMPTS[:1], 2, Sampling(max_new_tokens=3), seed=0)
    longer = [prompt * 20 for prompt in PROMPTS]
    sampling = Sampling(max_new_tokens=70)
    want = texts(LocalEngine(model).generate(longer, 2, sampling, seed=0))
    assert texts(engine.generate(longer, 2, sampling, seed=0)) == want
    held = engine._held
    assert texts(engine.generate(PROMPTS, 1, SAMPLING, seed=0)) == texts(
        LocalEngine(model).generate(PROMPTS, 1, SAMPLING, seed=0)
    )
    assert engine._held is held


def spoiling(run: Callable[[], object]) -> Callable[[], object]:
    """A capture that computes, but with the state of another moment."""

    def replay() -> None:
        [decoder] = [
            cell.cell_contents for cell in (run.__closure__ or ()) if hasattr(cell.cell_contents, "position")
        ]  # pyright: ignore
        decoder.position.add_(3)
        run()

    return replay


def idle(run: Callable[[], object]) -> Callable[[], object]:
    """A capture that computes once, and a replay that does nothing."""
    run()
    return lambda: None


def refusing(run: Callable[[], object]) -> Callable[[], object]:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("capture", "told"), [(spoiling, "captured step"), (idle, "captured step"), (refusing, "not permitted")]
)
def test_a_bad_capture_is_told_and_not_used(capture, told: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("qwen2")
    engine = like_cuda(LocalEngine(model, max_rows=13), capture)
    with caplog.at_level(logging.WARNING, logger="grpo_fast"):
        got = engine.generate(PROMPTS, 4, SAMPLING, seed=3)
    assert texts(got) == texts(LocalEngine(model).generate(PROMPTS, 4, SAMPLING, seed=3))
    [record] = caplog.records
    assert "without CUDA graphs" in record.getMessage() and told in record.getMessage()
    assert isinstance(engine._graphs, StepGraphs) and not engine._graphs.usable


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_only_fill_a_graph_stay_on_the_position_table(seed: int) -> None:
    """GPT-2 looks positions up: one past the last would be an error, on a GPU one that kills the process."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40, "vocab_size": VOCAB}
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes)).eval()
    sampling = Sampling(max_new_tokens=20, stop_token_ids=(3, 4, 5, 6, 7, 8))
    prompts = [list(range(10, 10 + length)) for length in (20, 12, 5)]
    want = texts(LocalEngine(model, max_rows=11).generate(prompts, 5, sampling, seed=seed))
    engine = like_cuda(LocalEngine(model, max_rows=11), runs_again)
    assert texts(engine.generate(prompts, 5, sampling, seed=seed)) == want


def test_buckets() -> None:
    for most in (1, 13, 256):
        for rows in range(1, most + 1):
            assert rows <= bucket_of(rows, most) <= min(most, max(8, rows * 3 // 2))
    assert len({bucket_of(rows, 256) for rows in range(1, 257)}) < 16


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bfloat16_logprobs_are_linear_logprobs(temperature: float) -> None:
    """Logits of a 16-bit head are never rounded to 16 bits: the engine's numbers are those of the training head."""
    model = tiny_model("qwen2").bfloat16()
    seen: list[torch.Tensor] = []
    model.base_model.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state.clone()))
    sampling = Sampling(temperature=temperature, max_new_tokens=20)
    [completion] = LocalEngine(model).generate([PROMPTS[0]], 1, sampling, seed=0)
    hidden = torch.cat([h[0, -1:] for h in seen])
    head, targets = head_of(model), torch.tensor(completion.token_ids)
    want, _ = linear_logprob(hidden, head.weight, targets, temperature=temperature)
    torch.testing.assert_close(completion.logprobs, want.detach(), atol=1e-4, rtol=0)
    rounded = (head.logits(hidden) / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert (rounded - want).abs().max() > 1e-3  # what bfloat16 logits would have given


@pytest.mark.parametrize("where", ["device", "host"])
def test_merged_adapters_leave_no_trace(where: str) -> None:
    model = tiny_model("llama")
    wrapped = add_lora(model, LoraSettings(rank=4))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    before = copy.deepcopy(model.state_dict())
    plain = LocalEngine(model)
    merged = LocalEngine(model, settings=EngineSettings(merge_lora=True, merge_copies=where))  # pyright: ignore
    products: list[int] = []
    adapter = model.base_model.layers[0].self_attn.q_proj.lora_A["default"]
    adapter.register_forward_hook(lambda *_: products.append(1))

    want = plain.generate(PROMPTS, 2, SAMPLING, seed=0)
    assert products
    products.clear()
    got = merged.generate(PROMPTS, 2, SAMPLING, seed=0)
    assert not products
    assert texts(got) == texts(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.logprobs, w.logprobs, atol=1e-4, rtol=0)

    def unwilling(*_) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        merged.generate(PROMPTS, 2, SAMPLING, seed=0, on_progress=unwilling)
    after = model.state_dict()
    assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in before)
    plain.generate(PROMPTS, 2, SAMPLING, seed=0)
    assert products


def test_eight_bit_keys_are_a_small_mismatch() -> None:
    """Half the bytes; log-probs are those of what was sampled from, and the loss's correction sees the difference."""
    model = tiny_model("qwen2").bfloat16()
    full = like_cuda(LocalEngine(model))
    small = LocalEngine(model, settings=EngineSettings(kv_dtype="fp8"))
    prompts = [prompt * 3 for prompt in PROMPTS]
    sampling = Sampling(max_new_tokens=40)
    full.generate(prompts, 4, sampling, seed=0)
    completions = small.generate(prompts, 4, sampling, seed=0)
    data, scales = 3 * 2 * 2 * 8, 3 * 2 * 2 * 4  # bytes a token: heads are 8 wide here, scales weigh much
    assert small.memory() / full.memory() == (data + scales) / (2 * data)
    owner = [p for p in range(len(prompts)) for _ in range(4)]
    with torch.no_grad():
        trainer = torch.cat(packed_logprobs(model, prompts, texts(completions), owner, token_budget=900))
    engine = torch.cat([c.logprobs for c in completions])
    _, metrics = grpo_loss(
        trainer,
        torch.ones_like(trainer),
        LossConfig.preset("dapo", mismatch="truncate"),
        old_logprobs=trainer,
        rollout_logprobs=engine,
    )
    difference = (trainer - engine).abs()
    bits16 = full.generate(prompts, 4, sampling, seed=0)
    with torch.no_grad():
        own = torch.cat(packed_logprobs(model, prompts, texts(bits16), owner, token_budget=900))
    floor = (own - torch.cat([c.logprobs for c in bits16])).abs().mean()
    assert floor < difference.mean() < 0.1
    assert metrics["mismatch_mean"] == pytest.approx(difference.mean().item(), rel=1e-3)
    assert 0 < metrics["mismatch_max"] < 1.0


class Tokens:
    """A byte-level tokenizer of 97 tokens: pieces of text, single bytes of a character, and one special token."""

    pieces = ("EN", "D", "N", " x", "E", "é".encode()[:1], "é".encode()[1:], "")

    def __call__(self, ids: list[int]) -> str:
        raw = b"".join(p.encode() if isinstance(p, str) else p for p in map(self.piece, ids))
        return raw.decode("utf-8", "replace")

    def piece(self, token: int) -> str | bytes:
        return self.pieces[token % len(self.pieces)]


@pytest.mark.parametrize("strings", [("END",), ("é", "DD"), (" xEN", "no such text")])
def test_stop_strings(strings: tuple[str, ...]) -> None:
    """The first token at which the whole text holds a string is the last, wherever tokens begin and end."""
    model, decode = tiny_model("qwen2"), Tokens()
    free = Sampling(max_new_tokens=60, temperature=2.0)
    stopped = Sampling(max_new_tokens=60, temperature=2.0, stop_strings=strings)
    reference = LocalEngine(model).generate(PROMPTS, 6, free, seed=5)
    want = []
    for completion in reference:
        ends = [i + 1 for i in range(60) if any(s in decode(completion.token_ids[: i + 1]) for s in strings)]
        want.append((completion.token_ids[: ends[0]], "stop") if ends else (completion.token_ids, "length"))
    assert {reason for _, reason in want} == {"stop", "length"}
    for engine in (
        LocalEngine(model, max_rows=8, decode=decode),
        like_cuda(LocalEngine(model, decode=decode)),
    ):
        got = engine.generate(PROMPTS, 6, stopped, seed=5)
        assert [(c.token_ids, c.finish_reason) for c in got] == want
        assert all(len(c.logprobs) == len(c.token_ids) for c in got)


@pytest.mark.parametrize("string", ["日本", "🙂", "top h", "ve: ", "here", "\n\n", "D."])
def test_stop_strings_of_a_byte_level_tokenizer(string: str) -> None:
    """Characters of several tokens, strings within tokens, special tokens in between."""
    tokenizer = build_tokenizer()

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    ids: Any = tokenizer.encode(
        "A naïve: tale of 日 and 日本, long before the END.\n\n 🙂 Stop he" + "re and there" * 3
    )
    ids = [token for one in ids for token in (one, *[tokenizer.pad_token_id] * (one % 7))]
    want = next(i for i in range(len(ids)) if string in decode(ids[: i + 1]))
    watch = StopStrings([string, "no such text"], decode)
    assert next(i for i, token in enumerate(ids) if watch.ends_with(token)) == want


def test_stop_strings_decode_a_bounded_tail_and_need_a_tokenizer() -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "a" * len(ids)

    sampling = Sampling(max_new_tokens=100, stop_strings=("b", "abc"))
    LocalEngine(tiny_model("qwen2"), decode=decode).generate(PROMPTS, 1, sampling, seed=0)
    assert longest <= 16
    with pytest.raises(UserError, match="stop_strings need the tokenizer"):
        LocalEngine(tiny_model("qwen2")).generate(PROMPTS, 1, sampling, seed=0)
    with pytest.raises(UserError, match="stop_strings"):
        Sampling(stop_strings=("",))
