"""How much memory a run will need, part by part, from configurations alone, and the settings that fit a limit."""
