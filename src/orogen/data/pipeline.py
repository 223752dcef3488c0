"""The steps in a tokenizer's file that change a text before its words become tokens, and the tokens afterwards."""

from typing import Any

from orogen.data.token_bytes import SPACE


def normalizers_of(file: dict[str, Any]) -> list[dict[str, Any]]:
    """The normalizers of a tokenizer's file, with all sequences flattened."""
    return _flat(file["normalizer"])


def only_spaces(normalizer: dict[str, Any]) -> bool:
    """Whether the normalizer only does what decoding undoes: it replaces spaces by "▁", or puts one before the text."""
    return normalizer in (
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    )


def without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """The normalizer or pre-tokenizer, changed so that it puts nothing before the text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        inside = "normalizers" if "normalizers" in part else "pretokenizers"
        steps = [without_prefix(step) for step in part[inside]]
        return {**part, inside: [step for step in steps if step is not None]}
    changes = {"prepend_scheme": "never"} if part["type"] == "Metaspace" else {"add_prefix_space": False}
    return {**part, **{key: value for key, value in changes.items() if key in part}}


def with_bos(post_processor: dict[str, Any] | None, bos: str, bos_id: int) -> dict[str, Any]:
    """A post-processor that puts bos before every text and nothing else around it; steps that only set offsets stay."""
    token = lambda segment: {"SpecialToken": {"id": bos, "type_id": segment}}  # noqa: E731
    text = lambda name, segment: {"Sequence": {"id": name, "type_id": segment}}  # noqa: E731
    template = {
        "type": "TemplateProcessing",
        "single": [token(0), text("A", 0)],
        "pair": [token(0), text("A", 0), token(1), text("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    steps = [] if post_processor is None else post_processor.get("processors", [post_processor])
    kept = [step for step in steps if step["type"] == "ByteLevel"]
    return {"type": "Sequence", "processors": [*kept, template]} if kept else template


def _flat(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [step for inner in part["normalizers"] for step in _flat(inner)] if part["type"] == "Sequence" else [part]
