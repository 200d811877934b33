"""What alignment costs: GRPO, PPO and DPO on equal terms (`python -m benchmarks.cost`)."""
