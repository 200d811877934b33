"""The reward model: scores against transformers' own, masked losses, training, and what it refuses."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import END, SIZES, byte_tokenizer, causal_model, config_of
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, MambaConfig, NemotronConfig

from grpo_fast.errors import UserError
from grpo_fast.models.reward_data import Head, LabelledReply, heads_of
from grpo_fast.models.reward_fit import fit, held_out_report
from grpo_fast.models.reward_model import RewardModel

NAN = float("nan")
HEADS = [
    Head(name="safety", mean=0.5, std=0.25),
    Head(name="tone", mean=2.0, std=1.5, low=0.0, high=4.0),
    Head(name="harmless", kind="binary", mean=0.7, std=0.46),
]
PROMPTS = ["How do I wash a cup?", "hi", "How do I wash a cup?", "Tell me a story, please.", "hi"]
REPLIES = ["First, get water.", "hello there", "", "Once upon a time there was a very small fox.", "no"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def model_of(
    family: str = "qwen2", *, heads: list[Head] | None = None, tokenizer=None, **overrides
) -> RewardModel:
    return RewardModel.from_config(
        config_of(family, **overrides), tokenizer or byte_tokenizer(), heads or HEADS
    )


def head_weight(model: RewardModel) -> Tensor:
    return model.model.get_parameter("score.weight")


def batches_of(model: RewardModel, budget: int = 4096):
    return model.pack(*model.encode(PROMPTS, REPLIES), token_budget=budget)


def labelled(n: int, *, seed: int = 0, missing: float = 0.2) -> list[LabelledReply]:
    """Replies of letters whose labels can be read off: share of a, whether a z occurs, and the length."""
    draw = random.Random(seed)
    examples = []
    for _ in range(n):
        text = "".join(draw.choices("abz", (3, 3, 0.4), k=draw.randint(3, 14)))
        labels = (text.count("a") / len(text), 3.0 * ("z" in text) - 1.0, float("z" in text))
        kept = tuple(NAN if draw.random() < missing else label for label in labels)
        examples.append(LabelledReply(draw.choice(["go:", "say:"]), text, kept))
    return examples


# Scores


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
def test_packed_scores_equal_one_at_a_time_in_any_order(family: str):
    model = model_of(family)
    alone = torch.cat([model.scores([p], [c]) for p, c in zip(PROMPTS, REPLIES, strict=True)])
    assert alone.shape == (5, 3) and alone.dtype == torch.float32
    for budget in (4096, 50, 1):
        torch.testing.assert_close(model.scores(PROMPTS, REPLIES, budget), alone, atol=1e-5, rtol=0)
    order = [3, 0, 4, 2, 1]
    turned = model.scores([PROMPTS[i] for i in order], [REPLIES[i] for i in order])
    torch.testing.assert_close(turned, alone[order], atol=1e-5, rtol=0)
    assert alone.std(dim=0).min() > 1e-3  # the replies really differ


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_saved_checkpoint_gives_the_same_outputs_in_transformers(tmp_path: Path, pad_is_end: bool):
    """Alone and right-padded. Where padding is the end token, both read at the token before it."""
    tokenizer = byte_tokenizer(pad=END) if pad_is_end else byte_tokenizer()
    model = model_of(tokenizer=tokenizer, pad_token_id=tokenizer.pad_token_id)
    model.save(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == {0: "safety", 1: "tone", 2: "harmless"}
    assert theirs.config.problem_type == "regression" and theirs.config.num_labels == 3
    prompt_ids, reply_ids, prompt_of = model.encode(PROMPTS, REPLIES)
    rows = [prompt_ids[p] + ids for ids, p in zip(reply_ids, prompt_of, strict=True)]
    assert all(row[-1] == 257 for row in rows)
    ours = model.scores(PROMPTS, REPLIES)
    alone = torch.cat([theirs(input_ids=torch.tensor([row])).logits for row in rows])
    width = max(map(len, rows))
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[k < len(row) for k in range(width)] for row in rows]).long()
    together = theirs(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(ours, model.to_units(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, model.to_units(together), atol=1e-5, rtol=0)
    cut = model.score_ids(prompt_ids, [ids[:-1] for ids in reply_ids], prompt_of)
    assert torch.allclose(cut, ours, atol=1e-5) == pad_is_end


def test_units():
    model = model_of()
    units = model.to_units(torch.tensor([[1.0, -1.0, 0.0]]))
    torch.testing.assert_close(units, torch.tensor([[0.75, 0.5, 0.5]]))


def test_save_and_load(tmp_path: Path):
    model = model_of("gemma2")
    model.save(tmp_path)
    again = RewardModel.load(tmp_path)
    assert again.heads == tuple(HEADS) and again.head_names == ["safety", "tone", "harmless"]
    assert torch.equal(again.scores(PROMPTS, REPLIES), model.scores(PROMPTS, REPLIES))
    half = RewardModel.load(tmp_path, dtype="bfloat16").scores(PROMPTS, REPLIES)
    assert half.dtype == torch.float32 and (half - model.scores(PROMPTS, REPLIES)).abs().max() < 0.2


def test_messages_go_through_the_chat_template():
    tokenizer = byte_tokenizer()
    model = model_of(tokenizer=tokenizer)
    asked = [{"role": "user", "content": "hi"}]
    plain = model.scores(["hi\n"], ["hello"])
    torch.testing.assert_close(model.scores([asked], ["hello"]), plain)
    tokenizer.chat_template = TEMPLATE
    templated = model.scores([asked], ["hello"])
    torch.testing.assert_close(templated, model.scores(["<user>hi<assistant>"], ["hello"]))
    assert not torch.allclose(templated, plain)
    prompts, replies, prompt_of = model.encode([asked, asked], ["yes", "no"])
    assert len(prompts) == 1 and prompt_of == [0, 0]
    assert tokenizer.decode(prompts[0] + replies[1]) == "<user>hi<assistant>no<|end|>"


def test_nothing_to_read():
    model = model_of()
    assert model.score_ids([[5, 6]], [[256, 256]], [0]).shape == (1, 3)  # reads the prompt's last token
    torch.testing.assert_close(model.score_ids([[5, 6]], [[]], [0]), model.score_ids([[5]], [[6]], [0]))
    torch.testing.assert_close(model.score_ids([[5]], [[]], [0]), model.score_ids([[]], [[5]], [0]))
    with pytest.raises(UserError, match="both empty"):
        model.score_ids([[]], [[]], [0])
    assert model.scores([], []).shape == (0, 3)


# Losses

LABELS = torch.tensor([[0.1, NAN, 1.0], [0.9, 3.0, 0.0], [NAN, 0.5, NAN], [0.4, NAN, 0.25], [NAN, 4.0, 1.0]])


def loss_and_gradient(model: RewardModel, budget: int, labels: Tensor = LABELS) -> tuple[float, Tensor]:
    model.zero_grad()
    counts = (~labels.isnan()).sum(dim=0)
    total = 0.0
    for batch in batches_of(model, budget):
        loss = model.loss(batch, labels[batch.sequence_index], counts)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_loss_is_the_mean_over_heads_of_the_observed_labels_losses():
    model = model_of()
    (batch,) = batches_of(model)
    with torch.no_grad():
        outputs = torch.empty(5, 3)
        outputs[batch.sequence_index] = model(batch)
    expected = 0.0
    for k, head in enumerate(HEADS):
        terms = []
        for output, label in zip(outputs[:, k].tolist(), LABELS[:, k].tolist(), strict=True):
            if math.isnan(label):
                continue
            if head.kind == "binary":
                terms.append(math.log1p(math.exp(output)) - label * output)
            else:
                terms.append((output - (label - head.mean) / head.std) ** 2)
        expected += sum(terms) / len(terms) / 3
    assert loss_and_gradient(model, 4096)[0] == pytest.approx(expected, rel=1e-5)


def test_loss_does_not_depend_on_packing_or_the_split():
    model = model_of()
    loss, gradient = loss_and_gradient(model, 4096)
    assert gradient.isfinite().all()
    for budget in (60, 1):
        other_loss, other = loss_and_gradient(model, budget)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(other, gradient, atol=1e-6, rtol=1e-4)


def test_a_missing_label_gives_no_gradient():
    model = model_of()
    only_first = torch.full((5, 3), NAN)
    only_first[1, 0] = 0.9
    loss_and_gradient(model, 4096, only_first)
    score = head_weight(model).grad
    assert isinstance(score, Tensor)
    assert score[0].abs().max() > 0 and score[1:].abs().max() == 0
    loss, gradient = loss_and_gradient(model, 4096, torch.full((5, 3), NAN))
    assert loss == 0 and gradient.abs().max() == 0


# Training


def trained(examples: list[LabelledReply], **options) -> tuple[RewardModel, list[float]]:
    heads = heads_of(["share", "tone", "z"], examples, {"z": "binary"})
    model = model_of(heads=heads, initializer_range=0.02)
    return model, fit(model, examples, **({"batch_size": 64, "lr": 3e-3} | options))


def test_training_learns_every_head_from_partly_missing_labels():
    calls = []
    model, losses = trained(labelled(1500), epochs=5, on_step=lambda *call: calls.append(call))
    assert [call[0] for call in calls] == list(range(1, len(losses) + 1)) and calls[0][1] == len(losses)
    assert [call[2] for call in calls] == losses
    report = held_out_report(model, labelled(300, seed=1))
    json.dumps(report, allow_nan=False)
    assert list(report) == ["share", "tone", "z"]
    assert report["share"]["spearman"] > 0.9 and report["share"]["mae"] < 0.5 * report["share"]["mae_of_mean"]
    assert report["tone"]["pearson"] > 0.9
    assert report["z"]["pearson"] > 0.9
    assert report["share"]["n"] == sum(not math.isnan(e.labels[0]) for e in labelled(300, seed=1))
    assert report["tone"]["head_correlation"]["z"] > 0.8 and "tone" not in report["tone"]["head_correlation"]
    assert report["z"]["label_length_correlation"] > 0.2


def test_same_seed_same_weights_whatever_the_budget():
    examples = labelled(120)
    first, losses = trained(examples, steps=6, seed=3)
    again, same = trained(examples, steps=6, seed=3)
    assert losses == same and len(losses) == 6
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    _, split = trained(examples, steps=6, seed=3, token_budget=200)
    assert split == pytest.approx(losses, rel=1e-3)
    _, other = trained(examples, steps=6, seed=4)
    assert other != losses


def test_bfloat16_weights_train_through_float32_copies(tmp_path: Path):
    causal_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    examples = [LabelledReply("p", "ab" * k, (k / 9, NAN, k % 2)) for k in range(10)]
    ends = []
    for dtype in ("float32", "bfloat16"):
        model = RewardModel.from_backbone(tmp_path, HEADS, dtype=dtype)
        ends.append(fit(model, examples, steps=12, lr=1e-3, batch_size=10, token_budget=60)[-1])
    assert next(model.parameters()).dtype == torch.bfloat16
    assert ends[1] == pytest.approx(ends[0], rel=0.15)


def test_head_statistics():
    examples = [LabelledReply("p", "c", labels) for labels in [(1.0, 1.0), (3.0, NAN), (NAN, 1.0)]]
    heads = heads_of(["a", "b"], examples, {"b": "binary"})
    assert heads[0] == Head(name="a", mean=2.0, std=1.0, low=1.0, high=3.0)
    assert heads[1] == Head(name="b", kind="binary", mean=1.0, std=1.0, low=1.0, high=1.0)


def test_report_of_what_is_not_defined():
    model = model_of()
    report = held_out_report(model, [LabelledReply("p", "c", (NAN, 1.0, 1.0))] * 3)
    assert report["safety"]["n"] == 0 and report["safety"]["mae"] is None
    assert report["tone"]["spearman"] is None and report["tone"]["mae"] > 0


def test_new_heads_on_a_language_model(tmp_path: Path):
    base = causal_model("llama")
    base.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = RewardModel.from_backbone(tmp_path, HEADS, seed=1)
    again = RewardModel.from_backbone(tmp_path, HEADS, seed=1)
    assert torch.equal(head_weight(model), head_weight(again))
    thrifty = RewardModel.from_backbone(tmp_path, HEADS, seed=1, gradient_checkpointing=True).train()
    torch.testing.assert_close(loss_and_gradient(thrifty, 4096), loss_and_gradient(again, 4096))
    name = "model.embed_tokens.weight"
    assert torch.equal(model.model.get_parameter(name), base.get_parameter(name))


# Refusals


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        RewardModel.load(path)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_reward_model(tmp_path: Path):
    refused(tmp_path / "absent", "no such folder")
    causal_model().save_pretrained(tmp_path)
    refused(tmp_path, "reward_heads.json is missing")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda rows: "{", "cannot be read"),
        (lambda rows: json.dumps({"heads": rows[:2]}), "names the heads safety, tone, config.json has"),
        (lambda rows: json.dumps({"heads": rows[::-1]}), "names the heads harmless"),
        (lambda rows: json.dumps({"heads": []}), "at least one head"),
        (lambda rows: json.dumps({"heads": [rows[0]] * 2}), "none twice"),
        (lambda rows: json.dumps({"heads": [rows[0] | {"std": 0.0}]}), "std > 0"),
        (lambda rows: json.dumps({"heads": [rows[0] | {"mean": NAN}]}), "must be finite"),
        (lambda rows: json.dumps({"heads": [rows[0] | {"kind": "rank"}]}), "kind must be"),
        (lambda rows: json.dumps({"heads": [rows[0] | {"colour": 1}]}), "colour"),
        (lambda rows: json.dumps([1]), "cannot be read"),
    ],
)
def test_broken_heads_file(tmp_path: Path, change, match: str):
    model_of().save(tmp_path)
    file = tmp_path / "reward_heads.json"
    file.write_text(change(json.loads(file.read_text())["heads"]))
    refused(tmp_path, match)


def test_broken_weights(tmp_path: Path):
    model_of().save(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = NAN
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(tmp_path, "model.norm.weight has NaN or infinite")
    del tensors["model.norm.weight"], tensors["score.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(tmp_path, "2 weights are not in its files")
    weights.write_bytes(weights.read_bytes()[:500])
    refused(tmp_path, "cannot read its weights")


def test_architectures_and_tokenizers_that_do_not_fit():
    with pytest.raises(UserError, match="mamba has no sequence classification"):
        RewardModel.from_config(MambaConfig(), byte_tokenizer(), HEADS)
    with pytest.raises(UserError, match="use a decoder"):
        RewardModel.from_config(BertConfig(vocab_size=300, hidden_size=24), byte_tokenizer(), HEADS)
    with pytest.raises(UserError, match="leak between sequences"):
        RewardModel.from_config(NemotronConfig(**SIZES), byte_tokenizer(), HEADS)
    with pytest.raises(UserError, match="ids up to 257, the model's embedding has 90 rows"):
        model_of(vocab_size=90, pad_token_id=None, eos_token_id=None)
    with pytest.raises(UserError, match="at least one head"):
        RewardModel.from_config(config_of("qwen2"), byte_tokenizer(), [])


def test_labels_that_do_not_fit():
    model = model_of()
    with pytest.raises(UserError, match="labelled reply 2: has 2 labels, expected 3"):
        fit(model, [LabelledReply("p", "c", (1, 1, 1)), LabelledReply("p", "c", (1, 1))], steps=1)
    with pytest.raises(UserError, match="label tone is infinite"):
        fit(model, [LabelledReply("p", "c", (1, math.inf, 1))], steps=1)
    with pytest.raises(UserError, match="nothing to train on"):
        fit(model, [LabelledReply("p", "c", (NAN, NAN, NAN))], steps=1)
    with pytest.raises(UserError, match="none of 1 has a label for b"):
        heads_of(["a", "b"], [LabelledReply("p", "c", (1.0, NAN))])
    with pytest.raises(UserError, match="a is binary"):
        heads_of(["a"], [LabelledReply("p", "c", (2.0,))], {"a": "binary"})
    with pytest.raises(UserError, match="loss is nan"):
        with torch.no_grad():
            head_weight(model).fill_(NAN)
        fit(model, [LabelledReply("p", "c", (1, 1, 1))], steps=1)
