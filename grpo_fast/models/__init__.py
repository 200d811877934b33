"""The policy and the reward model on `transformers` models, loaded, checked and packed."""
