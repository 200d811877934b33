"""What may go better another time: the failures of an engine that the guard tries again."""


class EngineError(Exception):
    """A rollout or a hand-over of weights that failed. The message is one line and says what came instead."""
