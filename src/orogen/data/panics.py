"""Reports panics of the `tokenizers` library, which is written in Rust, as errors of the input."""

import contextlib
from collections.abc import Iterator

from orogen.config.checks import ConfigError


@contextlib.contextmanager
def panics_refused(expected: str = "text that it can read") -> Iterator[None]:
    """Turns a panic of the library, which no `except Exception` catches, into a ConfigError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"the tokenizers library fails: {error}; expected {expected}") from None
