"""The gin files that come with Orogen, in a checkout and in an installed package alike."""

from pathlib import Path

# In a checkout a link to its top folder; a wheel holds the files themselves.
SHIPPED = (Path(__file__).parents[1] / "gin_configs").resolve()


def find(file: Path) -> Path:
    """`file`, or the shipped file of that name, `gin_configs/...`, if there is none at that place."""
    if not file.exists() and file.parts[:1] == ("gin_configs",):
        shipped = SHIPPED.joinpath(*file.parts[1:])
        return shipped if shipped.is_file() else file
    return file
