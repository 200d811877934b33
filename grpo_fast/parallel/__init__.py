"""The processes of a run: who there is, what they tell each other, and what happens when one of them dies."""
