"""Passes the exit status of the first process that failed to the script that started the task.

srun does not: if one process ends with status 2, srun ends the others, and returns 143 or 137 for them.
"""

import os
from pathlib import Path
from typing import Any

from orogen.config.streams import say

VARIABLE = "OROGEN_VERDICT"  # of the environment: the file that the first process to fail creates


def tell(status: Any) -> Any:
    """The exit status of this process, which is written into the file if it is not 0 and no other process has failed
    before. One that is killed tells nothing."""
    path = os.environ.get(VARIABLE)
    if path and status:
        try:
            with Path(path).open("x") as file:
                file.write(f"{status}\n")
        except FileExistsError:  # another process failed before
            return status
        except OSError as error:
            say(f"orogen: {path} cannot be written ({error.strerror}); the task may be started again")
    return status
