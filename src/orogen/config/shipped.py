"""The gin files that come with Orogen, in a checkout and in an installed package alike."""

from pathlib import Path

# In a checkout this is a link to the folder at its top; a wheel holds the files themselves.
SHIPPED = (Path(__file__).parents[1] / "gin_configs").resolve()


def find(file: Path) -> Path:
    """`file`; if it does not exist and its name is `gin_configs/...`, the shipped file of that name."""
    if not file.exists() and file.parts[:1] == ("gin_configs",):
        shipped = SHIPPED.joinpath(*file.parts[1:])
        return shipped if shipped.is_file() else file
    return file
