"""Runs in the sandbox, alone, as main.py: a check of a program that holds neither the check nor the verdict.

stdin is JSON {"program", "check"}. The check runs in the first process, whose status is the verdict; the program in
a child, forked before stdin is read, which gets its own source and, one JSON line each, calls of its functions. The
child may not look into the first process (`NOT_DUMPABLE`). In bubblewrap there is no other process to look into, for
the first is process 1 of its namespace; without, there are all others of this user.
Arguments and results are plain values (None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict),
as copies.
"""

import builtins
import json
import os

TYPE_CHECKING = False  # as type checkers know it: importing `typing` would cost every verification its time
if TYPE_CHECKING:
    from typing import Any

NOT_DUMPABLE = 4  # PR_SET_DUMPABLE: with 0, no process of this user reads this one's memory or open files
MOST_LINE = 2**20


def packed(x):
    """A plain value as JSON. Raises TypeError for another."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, bytes):
        return ["bytes", x.hex()]
    if isinstance(x, complex):
        return ["complex", [x.real, x.imag]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(x, kind):
            return [kind.__name__, [packed(one) for one in x]]
    if isinstance(x, dict):
        return ["dict", [[packed(key), packed(value)] for key, value in x.items()]]
    raise TypeError(f"{type(x).__name__} is no plain value")


def unpacked(x: "Any") -> "Any":
    """The inverse of `packed`."""
    if not isinstance(x, list):
        return x
    name, inside = x
    if name == "bytes":
        return bytes.fromhex(inside)
    if name == "complex":
        return complex(*inside)
    if name == "dict":
        return {unpacked(key): unpacked(value) for key, value in inside}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[name](map(unpacked, inside))


class Remote:
    """The program, in its own process."""

    def __init__(self, calls, answers):
        """Of the pipe that the program reads, and of the one that it writes."""
        self._calls, self._answers = os.fdopen(calls, "wb"), os.fdopen(answers, "rb")

    def start(self, program):
        """Runs the program, which tells its names."""
        self.names = self._exchange(program)

    def _exchange(self, message):
        self._calls.write(json.dumps(message).encode() + b"\n")
        self._calls.flush()
        line = self._answers.readline(MOST_LINE)
        if not line.endswith(b"\n"):
            raise EOFError("the program ended, or said too much")
        return json.loads(line)

    def call(self, name, args, named):
        """What the program's function returns. Raises what it raised, by the name of a built-in error."""
        found = self._exchange([name, packed(args), packed(named)])
        if "raised" in found:
            kind = getattr(builtins, str(found["raised"]), RuntimeError)
            known = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError)
            raise (kind if known else RuntimeError)("in the program")
        return unpacked(found["value"])

    def namespace(self):
        """What the check sees of the program: its functions and plain values; built-in names are the check's own."""
        found: dict = {"__name__": "check"}
        for name, value in self.names.items():
            if not hasattr(builtins, name) and not name.startswith("__"):
                found[name] = self._function(name) if value is None else unpacked(value[0])
        return found

    def _function(self, name):
        return lambda *args, **named: self.call(name, args, named)


def check():
    """Ends with status 0 if the check runs to its end."""
    program = started()
    import ctypes  # the program needs none of it

    with os.fdopen(0, "rb") as stdin:
        given = json.loads(stdin.read())
    os.open(os.devnull, os.O_RDONLY)
    if ctypes.CDLL(None).prctl(NOT_DUMPABLE, 0, 0, 0, 0):
        raise OSError("prctl failed")
    program.start(given["program"])
    exec(compile(given["check"], "check", "exec", dont_inherit=True), program.namespace())


def started():
    """The process of the program, which waits for it."""
    (calls, asks), (tells, answers) = os.pipe(), os.pipe()
    if os.fork():
        os.close(calls)
        os.close(answers)
        return Remote(asks, tells)
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # where the check still lies
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the program prints is nothing here
        os.close(asks)
        os.close(tells)
        serve(calls, answers)
        status = 0
    finally:
        os._exit(status)


def serve(calls, answers):
    """Runs the program, then its functions."""
    calls, answers = os.fdopen(calls, "rb"), os.fdopen(answers, "wb")

    def say(message):
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    held: dict = {"__name__": "__main__"}
    exec(compile(json.loads(calls.readline()), "program", "exec", dont_inherit=True), held)
    say(shown(held))
    for line in calls:
        name, args, named = json.loads(line)
        try:
            say({"value": packed(held[name](*unpacked(args), **unpacked(named)))})
        except Exception as error:
            say({"raised": type(error).__name__})


def shown(held):
    """Names of a program: None for what can be called, [value] for plain values."""
    found = {}
    for name, value in held.items():
        if callable(value):
            found[name] = None
        elif not name.startswith("__"):
            try:
                found[name] = [packed(value)]
            except TypeError:
                continue  # a module, for example: the check imports its own
    return found


if __name__ == "__main__":
    check()
