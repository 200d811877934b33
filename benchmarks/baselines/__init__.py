"""The algorithms that are compared, each one file that reads top to bottom, on the trainer's own parts."""
