"""Prompts: from files and the hub to token ids."""
