"""TRL's PPO trainer on the prompts of `benchmarks.cost.peers`; runs in a Python of its own that has a trl with PPO.

The last release that ships one is 1.12.0 (`trl.experimental.ppo`). `trl_ppo.py SPEC` (JSON): trains SPEC["folder"] with
the one-output reward model SPEC["reward"] (plus SPEC["constant"], for which it has no bias) and the value model
SPEC["value"] on SPEC["prompts"] (a JSONL file, a list of token ids in each line), writes the model to SPEC["output"],
and answers with its versions and then with its seconds: generation, scoring and training, nothing loaded.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers.answers import answer, check_tokens  # noqa: I001  (before what prints)

import torch
import transformers
import trl  # pyright: ignore[reportMissingImports]
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore[reportMissingImports]


def main() -> None:
    spec = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(spec["folder"], padding_side="left")
    check_tokens(tokenizer, spec["text"], spec["token_ids"])
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=torch.float32) for _ in range(2)
    )
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(spec[name], dtype=torch.float32)
        for name in ("reward", "value")
    )
    reward.score.bias = torch.nn.Parameter(torch.full((1,), spec["constant"]))
    reward.eval().requires_grad_(False)
    with open(spec["prompts"], encoding="utf-8") as lines:
        prompts = [{"input_ids": json.loads(line)} for line in lines]
    settings = PPOConfig(
        output_dir=spec["output"],
        total_episodes=spec["completions"],
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=spec["batch"],
        num_mini_batches=spec["minibatches"],
        num_ppo_epochs=spec["epochs"],
        response_length=spec["new_tokens"],
        temperature=spec["temperature"],
        stop_token="eos",
        kl_coef=spec["kl_coef"],
        kl_estimator="k1",
        cliprange=spec["clip"],
        cliprange_value=spec["value_clip"],
        vf_coef=spec["value_coef"],
        gamma=spec["gamma"],
        lam=spec["lam"],
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=spec["seed"],
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": policy.parameters(), "lr": spec["lr"]},
            {"params": value.parameters(), "lr": spec["value_lr"]},
        ],
        betas=spec["betas"],
        eps=spec["eps"],
        weight_decay=0.0,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    trainer = PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list(prompts),
        optimizers=(optimizer, schedule),
    )
    answer({"versions": versions, "threads": torch.get_num_threads()})
    started = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu_s = time.perf_counter() - started[0], time.process_time() - started[1]
    policy.save_pretrained(spec["output"])
    tokenizer.save_pretrained(spec["output"])
    answer({"seconds": seconds, "cpu_s": cpu_s})


main()
