"""One optimizer step: where its states live, and in how many bits."""
