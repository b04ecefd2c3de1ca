"""Where a copy of the program lacks a folder of extras/: one line, not a traceback."""

import importlib
import sys


def missing_room(error: ModuleNotFoundError) -> str:
    """Say what to do where an option needs a room of extras/ that this copy of the program lacks.

    Raises the error again if it is about something else.
    """
    if (error.name or "").split(".")[0] != "extras":
        raise error
    return "these options need the folder extras/, which this copy of the program does not have"


def run_command(module: str) -> int:
    """Run the command that a file of extras/ is, and return its exit status; 2 without extras/."""
    try:
        return importlib.import_module(module).main()
    except ModuleNotFoundError as error:
        print(f"error: {missing_room(error)}", file=sys.stderr)
        return 2
