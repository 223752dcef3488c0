"""The product that reads each weight of a layer's mixer: its kind and its number among those of the kind."""

Path = tuple[str | int, ...]

EXPERTS, SHARED = ("mixer", "experts"), ("mixer", "shared")
_MAMBA = {"z": ("mamba_in", 0), "x": ("mamba_in", 0), "out": ("mamba_out", 0)}
_ATTENTION = {
    "query": ("attention_in", 0), "key": ("attention_in", 0), "value": ("attention_in", 0),
    "out": ("attention_out", 0),
}  # fmt: skip
_LATENT = {
    "query": ("attention_in", 0), "query_down": ("attention_in", 0), "latent_down": ("attention_in", 1),
    "key_rope": ("attention_in", 1), "key_up": ("attention_in", 2), "value_up": ("attention_in", 2),
    "query_up": ("attention_in", 3), "out": ("attention_out", 0),
}  # fmt: skip
# The kind of each weight of a letter's mixer, and the number of the product that reads it, as the layers have them.
PRODUCTS: dict[str, dict[str, tuple[str, int]]] = {
    "M": {**_MAMBA, "B": ("mamba_in", 0), "C": ("mamba_in", 0), "dt": ("mamba_in", 1)},
    "m": _MAMBA,
    "*": _ATTENTION,
    "w": _ATTENTION,
    "+": _LATENT,
    "-": {"up": ("dense_up", 0), "gate": ("dense_up", 0), "down": ("dense_down", 0)},
    "E": {"latent_down": ("latent_down", 0), "latent_up": ("latent_up", 0)},
    **dict.fromkeys("xg", {}),
}
_SHARED = {"up": ("shared_up", 0), "gate": ("shared_up", 0), "down": ("shared_down", 0)}
_ROUTED = {"up": ("routed_up", 0), "gate": ("routed_up", 1), "down": ("routed_down", 0)}


def product_of(letter: str, name: Path) -> tuple[str, int] | None:
    """The kind and number of the product that reads a layer's parameter, by its path below the layer; None: no such."""
    tables: dict[Path, dict[str, tuple[str, int]]] = {EXPERTS: _ROUTED, SHARED: _SHARED}
    table = tables.get(name[:2], PRODUCTS[letter] if len(name) == 2 else {})
    return table.get(str(name[-1])) if name[0] == "mixer" else None
