"""The miniature as a task: builds its policy and reward model, trains both, and hands over prompts and judge."""

import json
import math
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from grpo_fast.config.resolve import resolve_device, resolve_dtype
from grpo_fast.config.settings import MiniatureSettings, TrainConfig
from grpo_fast.data.prompts import Prompt, Row, tokenize
from grpo_fast.engines.base import Sampling
from grpo_fast.errors import UserError
from grpo_fast.miniature import world
from grpo_fast.miniature.judge import is_refusal, judge
from grpo_fast.miniature.tokenizer import END, PAD, build_tokenizer
from grpo_fast.models.policy import Policy
from grpo_fast.models.reward_data import LabelledReply, heads_of
from grpo_fast.models.reward_fit import fit, held_out_report
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.optim import Optimizer, learning_rate
from grpo_fast.packing import pack
from grpo_fast.rewards.functions import RewardFunctions
from grpo_fast.run.live import Run
from grpo_fast.run.metrics import write_atomically
from grpo_fast.scoring import Scorer
from grpo_fast.task import Task, lora_settings, tokens_to_ids

TRAINING_PROMPTS = 4096
HELD_OUT_LABELS = 600
TOKEN_BUDGET = 8192


def prepare(config: TrainConfig, functions: RewardFunctions | None, run: Run) -> Task:
    """Train the miniature's policy and reward model, or take them from the run's folder where it has them.

    `start/` is the warm-started policy, the reference of the KL term; `reward_model/` the reward model with
    `quality.json`, its held-out quality. Each is written once its training is complete.
    """
    start, reward_folder = run.path / "start", run.path / "reward_model"
    if not (start / "config.json").is_file():
        with run.phase_timer("warm_start"):
            warm_start(config, run).save(start)
    if not (reward_folder / "quality.json").is_file():
        with run.phase_timer("reward_model"):
            trained = train_reward_model(config, start, run)
            trained.save(reward_folder)
            write_atomically(reward_folder / "quality.json", json.dumps(quality(trained, config), indent=2))
    device = resolve_device(config)
    policy = Policy.load(
        start,
        dtype=resolve_dtype(config, device),
        device=device,
        lora=lora_settings(config),
        gradient_checkpointing=config.policy.gradient_checkpointing,
        liger=config.policy.liger,
    )
    reward_model = RewardModel.load(reward_folder, device=device)
    return Task(
        policy=policy,
        scorer=Scorer.create(config.reward, reward_model, functions),
        sampling=Sampling.of(
            config.rollout,
            [*policy.stop_token_ids, *tokens_to_ids(policy.tokenizer, config.rollout.stop_tokens)],
        ),
        prompts=prompts("train", TRAINING_PROMPTS, config.seed, policy.tokenizer),
        heldout=prompts("heldout", config.data.eval_size, config.seed, policy.tokenizer),
        judge=true_scores,
        reward_report=_saved_quality(reward_folder / "quality.json"),
    )


def prompts(split: world.Split, n: int, seed: int, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """`n` prompts of a split as chats of one message; the world's own view of each is in `columns["ask"]`."""
    rows = [
        Row(
            _chat(ask.text),
            {"ask": ask, "kind": ask.topic.kind, "style": ask.style},
            f"{split} prompt {index}",
        )
        for index, ask in enumerate(world.prompts(split, n, seed))
    ]
    return tokenize(rows, tokenizer)


def true_scores(prompt: Prompt, completion: str) -> dict[str, float]:
    """The judge's view of one completion: every objective, and `refusal` where refusing is wrong."""
    ask = prompt.columns["ask"]
    scores = dict(judge(ask, completion)._asdict())
    return scores if ask.topic.kind == "harmful" else scores | {"refusal": float(is_refusal(completion))}


def warm_start(config: TrainConfig, run: Run) -> Policy:
    """A new policy, trained on the world's mixture of good and bad replies by maximum likelihood."""
    settings, tokenizer = config.miniature, build_tokenizer()
    torch.manual_seed(config.seed)
    model = Qwen2ForCausalLM(tiny_config(settings, tokenizer))
    policy = Policy.from_model(model, tokenizer).to(resolve_device(config))
    examples = world.demonstrations("train", settings.demonstrations, config.seed)
    asked = tokenize([Row(_chat(ask.text), {}, "demonstration") for ask, _ in examples], tokenizer)
    prompt_ids = [prompt.token_ids for prompt in asked]
    reply_ids = [[*tokenizer.encode(reply), tokenizer.eos_token_id] for _, reply in examples]

    steps_per_epoch = math.ceil(len(examples) / settings.batch_size)
    steps = steps_per_epoch * settings.warm_epochs
    optimizer = Optimizer(
        policy.trainable_parameters(), lr=settings.warm_lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    order = torch.Generator().manual_seed(config.seed)
    permutation: list[int] = []
    run.begin("warm_start", steps)
    for step in range(steps):
        if step % steps_per_epoch == 0:
            permutation = torch.randperm(len(examples), generator=order).tolist()
        first = step % steps_per_epoch * settings.batch_size
        chosen = permutation[first : first + settings.batch_size]
        tokens = sum(len(reply_ids[i]) for i in chosen)
        loss = 0.0
        for batch in pack(
            [prompt_ids[i] for i in chosen], [reply_ids[i] for i in chosen], token_budget=TOKEN_BUDGET
        ):
            part = policy.sft_loss(batch.to(policy.device), tokens)
            part.backward()
            loss += part.item()
        lr = learning_rate(step, lr=settings.warm_lr, warmup_steps=20, total_steps=steps, schedule="cosine")
        norm, _ = optimizer.step(lr)
        run.step(step + 1, {"loss": loss, "grad_norm": norm, "lr": lr, "trained_tokens": tokens})
        run.check_stop()
    return policy


def train_reward_model(config: TrainConfig, start: Path, run: Run) -> RewardModel:
    """One head per objective on the warm-started policy's backbone, trained on noisy and partly missing labels."""
    settings = config.miniature
    examples = labelled("train", settings.labelled, config.seed)
    heads = heads_of(world.OBJECTIVES, examples)
    model = RewardModel.from_backbone(start, heads, seed=config.seed, device=resolve_device(config))

    def on_step(step: int, steps: int, loss: float) -> None:
        if step == 1:
            run.begin("reward_model", steps)
        run.step(step, {"loss": loss})
        run.check_stop()

    fit(
        model,
        examples,
        epochs=settings.reward_epochs,
        lr=settings.reward_lr,
        batch_size=settings.batch_size,
        token_budget=TOKEN_BUDGET,
        seed=config.seed,
        on_step=on_step,
    )
    return model


def quality(model: RewardModel, config: TrainConfig) -> dict:
    """How well the heads predict the noisy labels of held-out topics and phrasings."""
    return held_out_report(model, labelled("heldout", HELD_OUT_LABELS, config.seed))


def _saved_quality(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged: delete it, and the reward model is trained again") from None


def labelled(split: world.Split, n: int, seed: int) -> list[LabelledReply]:
    """The world's labelled replies in the form the reward model is trained on."""
    return [
        LabelledReply(_chat(ask.text), reply, labels)
        for ask, reply, labels in world.labelled_replies(split, n, seed)
    ]


def tiny_config(settings: MiniatureSettings, tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """A Qwen2 architecture of the miniature's size."""
    end, pad = (tokenizer.get_vocab()[token] for token in (END, PAD))
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
