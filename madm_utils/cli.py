"""How every script ends: exit code 0 when done, 1 when some inputs failed, 2 for wrong use or bad input.

A mistake of the user is a `UserError`: one message that says what was wrong, where, and what to do. `run` prints
it on standard error without a traceback. Anything else is a defect of ours and keeps its traceback.
"""

import logging
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input or wrong use. The message names what was found, what was expected, and the remedy."""


def quiet_libraries() -> None:
    """Keep the libraries' notes about themselves (missing optional packages, shards written) off the screen.

    Call it before they are imported; a level that the user set in the environment stays.
    """
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def parse_early(parse: Callable[[], object]) -> None:
    """Try the command line before the heavy imports, so that `--help` and a mistake answer at once."""
    quiet_libraries()
    try:
        parse()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and leave the process with its exit code (`None` counts as 0)."""
    quiet_libraries()
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        # The reader of our output (`| head`) has left; keep the interpreter from complaining at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
