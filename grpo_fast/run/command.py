"""How every command ends: 0, 2 with one line for a user's mistake, 130 after Ctrl-C."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from grpo_fast.errors import UserError
from grpo_fast.run.allocator import keep_freed_memory
from grpo_fast.shown import error_line


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Call `command` and exit with what it returns; a UserError is one line on stderr and exit code 2."""
    try:
        code = command() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (
        OSError
    ) as error:  # a full disk, a folder that may not be written: a traceback would explain nothing
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {error_line(f'{where}{error.strerror or error}')}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def prepare_libraries(threads: int) -> None:
    """What every long command does first: quiet libraries, `threads` CPU threads (0: PyTorch's choice)."""
    import torch
    import transformers

    keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UserErrors, with the nearest known flag named."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        known = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown.partition("=")[0], known, n=1)
        raise UserError(
            f"{message}{f' (did you mean {near[0]}?)' if near else ''}; --help lists the arguments"
        )
