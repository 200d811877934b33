"""The user's reward functions, and the objectives' names and weights."""
