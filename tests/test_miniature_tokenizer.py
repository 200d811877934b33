"""The miniature's tokenizer: the same each time, whole words, and alive after a round through a folder."""

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from grpo_fast.miniature.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, build_tokenizer, render
from grpo_fast.miniature.topics import ACTIONS, OBJECTS, TOOLS
from grpo_fast.miniature.world import labelled_replies, prompts


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def reloaded(tokenizer, tmp_path_factory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("model")
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_reloading_through_auto_tokenizer_keeps_ids_and_text(tokenizer, reloaded):
    texts = [text for ask, reply, _ in labelled_replies("heldout", 500, seed=0) for text in (ask.text, reply)]
    texts += ["", "naïve: 日本 \n\n\t12345  a", 'don\'t "x" 🙂', f"{render('Hi.')}No.{tokenizer.eos_token}"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert reloaded.encode(text) == ids
        assert tokenizer.decode(ids) == reloaded.decode(ids) == text
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert reloaded.chat_template == tokenizer.chat_template


def test_pad_and_end_are_distinct_special_tokens(tokenizer, reloaded):
    for one in (tokenizer, reloaded):
        assert one.pad_token_id != one.eos_token_id
        assert (
            one.decode(one.encode(f"{render('Hi.')}No.{one.eos_token}"), skip_special_tokens=True) == "Hi.No."
        )
    assert all(len(tokenizer.encode(token)) == 1 for token in SPECIAL_TOKENS)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(tokenizer) <= VOCAB_SIZE


def test_chat_template_renders_as_a_bare_prompt_does(reloaded):
    message = {"role": "user", "content": "How do I find the ants?"}
    rendered = reloaded.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert rendered == render("How do I find the ants?")
    turns = [
        {"role": "system", "content": "Be kind."},
        message,
        {"role": "assistant", "content": "No."},
        message,
    ]
    rendered = reloaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert (
        rendered == f"<|system|>Be kind.{render(message['content'])}No.<|im_end|>{render(message['content'])}"
    )


def test_topic_words_are_one_token_and_texts_are_short(tokenizer):
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in (*ACTIONS, *OBJECTS, *TOOLS))
    assert max(len(tokenizer.encode(render(ask.text))) for ask in prompts("heldout", 1000, seed=0)) <= 32


def test_held_out_prompts_hold_no_unknown_token(tokenizer):
    known = {token for ask in prompts("train", 6000, seed=0) for token in tokenizer.encode(ask.text)}
    for ask in prompts("heldout", 3000, seed=0):
        assert known.issuperset(tokenizer.encode(ask.text)), ask.text


def test_another_process_builds_the_same_tokenizer(tokenizer):
    code = (
        "import json; from grpo_fast.miniature.tokenizer import build_tokenizer;"
        "print(json.dumps(build_tokenizer().get_vocab()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == tokenizer.get_vocab()
