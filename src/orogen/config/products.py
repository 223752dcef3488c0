"""The product that reads each weight of a layer's mixer: its kind and its number among those of the kind."""

from collections.abc import Mapping

from orogen.config.kinds import Product, kind_of

Path = tuple[str | int, ...]

EXPERTS, SHARED = ("mixer", "experts"), ("mixer", "shared")
# The kind of each weight of an expert, and the number of the product that reads it.
_SHARED = {"up": ("shared_up", 0), "gate": ("shared_up", 0), "down": ("shared_down", 0)}
_ROUTED = {"up": ("routed_up", 0), "gate": ("routed_up", 1), "down": ("routed_down", 0)}


def product_of(letter: str, name: Path) -> Product | None:
    """The kind and number of the product that reads a layer's parameter, by its path below the layer; None: no such."""
    tables: dict[Path, Mapping[str, Product]] = {EXPERTS: _ROUTED, SHARED: _SHARED}
    table = tables.get(name[:2], kind_of(letter).products if len(name) == 2 else {})
    return table.get(str(name[-1])) if name[0] == "mixer" else None
