"""The miniature's tokenizer: byte-level BPE in the form of Qwen2's, learned from the world's own text.

It is a real `Qwen2Tokenizer`, because that is what `AutoTokenizer` builds for a folder whose model is a
Qwen2, whatever class saved it: so a saved folder loads with the same ids.
"""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from grpo_fast.miniature.replies import FIXED_SENTENCES
from grpo_fast.miniature.topics import ACTIONS, OBJECTS, TOOLS
from grpo_fast.miniature.world import demonstrations

VOCAB_SIZE = 1024
PAD, END, SYSTEM, USER, ASSISTANT = "<|endoftext|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, END, SYSTEM, USER, ASSISTANT)
# One mark before each turn, the end mark after every reply.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Learns the tokenizer: always the same one, `VOCAB_SIZE` entries, padding distinct from the end mark.

    `save_pretrained` and `AutoTokenizer.from_pretrained` give it back with the same ids.
    """
    form = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer = form.normalizer
    learner.pre_tokenizer = form.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(_corpus(), trainer=trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab={**learned["vocab"], **{t: len(learned["vocab"]) + i for i, t in enumerate(SPECIAL_TOKENS)}},
        merges=[tuple(pair) for pair in learned["merges"]],  # pyright: ignore[reportArgumentType]
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render(prompt: str) -> str:
    """A bare prompt as the policy sees it: what the chat template makes of one user message."""
    return f"{USER}{prompt}{ASSISTANT}"


def _corpus() -> list[str]:
    """Texts of the training split, and each topic word and tool often enough to become one token."""
    texts = [text for ask, reply in demonstrations("train", 1500, seed=0) for text in (ask.text, reply)]
    return [*texts, " ".join(FIXED_SENTENCES), *[f"the {word}" for word in (*ACTIONS, *OBJECTS, *TOOLS)] * 5]
