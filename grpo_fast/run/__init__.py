"""A run's folder, display, checkpoints and end."""
