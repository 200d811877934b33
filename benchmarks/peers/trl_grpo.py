"""TRL's GRPO trainer on the work of `benchmarks.step`; runs in a Python of its own that has trl.

`trl_grpo.py SPEC` (JSON): loads SPEC["folder"], answers with its versions (and, where SPEC["batch"] names a file, with
the loss of that fixed batch, its gradients written beside it), then takes one step for every line on standard input and
answers with its seconds, from the end of the step before to the end of this one.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print must not get between the answers

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402  # pyright: ignore[reportMissingImports]
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402

from benchmarks.step.reward import even_digits  # noqa: E402


def answer(found: dict) -> None:
    answers.write(json.dumps(found) + "\n")
    answers.flush()


class OnDemand(TrainerCallback):
    """Waits for a line before every step; the end of the input ends the training."""

    def __init__(self, clock: str) -> None:
        self.clock = time.process_time if clock == "cpu" else time.perf_counter

    def _wait(self, control) -> None:
        if not sys.stdin.readline():
            control.should_training_stop = True
        self.started = self.clock()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._wait(control)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        answer({"seconds": self.clock() - self.started})
        self._wait(control)


def batch_loss(trainer, path: Path) -> float:
    """The loss of a saved batch by the trainer's own function; the gradients go to `<path>.trl`."""
    batch = torch.load(path)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    torch.save(gradients, f"{path}.trl")
    trainer.model.zero_grad()
    return loss.item()


def main() -> None:
    spec = json.loads(sys.argv[1])
    folder = Path(spec["folder"])
    on_gpu = spec["device"] == "cuda"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, spec["dtype"]))
    settings = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=spec["micro_batch"],
        gradient_accumulation_steps=spec["prompts"] * spec["group"] // spec["micro_batch"],
        num_generations=spec["group"],
        max_completion_length=spec["new_tokens"],
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=10**6,
        logging_steps=10**6,
        gradient_checkpointing=spec["checkpointing"],
        generation_kwargs={"eos_token_id": None},
        use_transformers_continuous_batching=spec["continuous_batching"] is not None,
        transformers_continuous_batching_config=spec["continuous_batching"],
        bf16=on_gpu,
        use_cpu=not on_gpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        args=settings,
        reward_funcs=even_digits,
        train_dataset=Dataset.from_list([{"prompt": text} for text in spec["texts"]]),
        processing_class=tokenizer,
        callbacks=[OnDemand(spec["clock"])],
    )
    trainer.eos_token_ids = [-1]  # nothing ends a completion early, here as for the other contenders
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    loss = batch_loss(trainer, Path(spec["batch"])) if spec["batch"] else None
    answer({"versions": versions, "loss": loss, "threads": torch.get_num_threads()})
    trainer.train()


main()
