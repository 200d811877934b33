"""A run's folder stays inside itself: nothing that is written, replaced or deleted in it is reached through a link."""

from pathlib import Path

from grpo_fast.errors import UserError

_WRITTEN = ("checkpoints", "dumps", "tensorboard")


def refuse_links(run_dir: Path) -> None:
    """UserError where a file or folder that the run would write is a symbolic link.

    The run's folder itself may be one, or lie behind one: that is the user's choice of a place.
    """
    below = [run_dir / name for name in _WRITTEN]
    for folder in (run_dir, *(path for path in below if path.is_dir() and not path.is_symlink())):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link: a run writes inside its own folder alone; put what it points to there"
                )
