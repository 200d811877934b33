"""What alignment costs: the work of GRPO, PPO and DPO counted, measured and foreseen."""
