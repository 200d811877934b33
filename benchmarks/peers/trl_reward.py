"""TRL's reward trainer on the pairs of `benchmarks.reward_model train`; runs in a Python of its own that has trl.

`trl_reward.py FOLDER SEED BATCH LR`: reads FOLDER/backbone and FOLDER/pairs.jsonl, writes FOLDER/theirs, prints JSON.
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers
import trl  # pyright: ignore[reportMissingImports]
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder, seed, batch, lr = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
torch.manual_seed(seed)
tokenizer = AutoTokenizer.from_pretrained(folder / "backbone")
model = AutoModelForSequenceClassification.from_pretrained(folder / "backbone", num_labels=1)
model.config.pad_token_id = tokenizer.pad_token_id
rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
settings = trl.RewardConfig(
    output_dir=str(folder / "trl"),
    per_device_train_batch_size=batch,
    num_train_epochs=1,
    learning_rate=lr,
    lr_scheduler_type="cosine",
    warmup_steps=round(0.05 * len(rows) / batch),
    weight_decay=0.01,
    max_length=512,
    center_rewards_coefficient=0.01,
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=True,
    seed=seed,
    save_strategy="no",
    logging_steps=10**6,
    report_to="none",
    disable_tqdm=True,
)
trainer = trl.RewardTrainer(
    model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
)
started = time.perf_counter()
trainer.train()
seconds = time.perf_counter() - started
model.save_pretrained(folder / "theirs")
tokenizer.save_pretrained(folder / "theirs")
found = {
    "trl": trl.__version__,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "seconds": seconds,
}
print(json.dumps(found))
