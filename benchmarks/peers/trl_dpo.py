"""TRL's DPO trainer on the pairs of `benchmarks.cost.peers`; runs in a Python of its own that has trl.

`trl_dpo.py SPEC` (JSON): trains SPEC["folder"] against SPEC["reference"] on SPEC["pairs"] (JSONL with prompt_ids,
chosen_ids and rejected_ids in each line), an epoch for each of SPEC["orders"], writes the model to SPEC["output"], and
answers with its versions and then with its seconds: reference log-probs and training, nothing loaded. Where
SPEC["batch"] names a file of pairs, the loss of that batch is answered instead of training, and its gradients are
written beside the file.
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
from transformers import AutoModelForCausalLM, AutoTokenizer


class InOrders(torch.utils.data.Sampler[int]):
    """Every epoch the order it is told."""

    def __init__(self, orders: list[list[int]]) -> None:
        self.orders, self.epoch = orders, -1

    def __len__(self) -> int:
        return len(self.orders[0])

    def __iter__(self):
        self.epoch += 1
        return iter(self.orders[self.epoch])


class OnTokens(trl.DPOTrainer):
    """Takes the pairs' tokens as they are: a completion that was cut off gets no end token, no text is read anew."""

    orders: list[list[int]]

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        return InOrders(self.orders)


def read_pairs(path: str) -> list[dict[str, list[int]]]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def batch_loss(trainer: OnTokens, path: str) -> float:
    """The loss of the pairs in a file by the trainer's own function; the gradients go to `<path>.trl`."""
    inputs = trainer.data_collator(read_pairs(path))
    trainer.precompute_ref_logps = False
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    torch.save({name: weight.grad for name, weight in trainer.model.named_parameters()}, f"{path}.trl")
    return loss.item()


def main() -> None:
    spec = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(spec["folder"])
    check_tokens(tokenizer, spec["text"], spec["token_ids"])
    model, reference = (
        AutoModelForCausalLM.from_pretrained(spec[name], dtype=torch.float32)
        for name in ("folder", "reference")
    )
    pairs = read_pairs(spec["pairs"])
    settings = trl.DPOConfig(
        output_dir=spec["output"],
        beta=spec["beta"],
        loss_type=["sigmoid"],
        precompute_ref_log_probs=spec["batch"] is None,
        max_length=None,
        num_train_epochs=len(spec["orders"]),
        per_device_train_batch_size=spec["pairs_per_step"],
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=spec["betas"][0],
        adam_beta2=spec["betas"][1],
        adam_epsilon=spec["eps"],
        weight_decay=0.0,
        max_grad_norm=spec["max_grad_norm"],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=spec["seed"],
    )
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    answer({"versions": versions, "threads": torch.get_num_threads()})
    OnTokens.orders = spec["orders"]
    started = time.perf_counter(), time.process_time()
    trainer = OnTokens(
        model=model,
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    if spec["batch"] is not None:
        answer({"loss": batch_loss(trainer, spec["batch"])})
        return
    trainer.train()
    seconds, cpu_s = time.perf_counter() - started[0], time.process_time() - started[1]
    trainer.model.save_pretrained(spec["output"])
    tokenizer.save_pretrained(spec["output"])
    answer({"seconds": seconds, "cpu_s": cpu_s})


main()
