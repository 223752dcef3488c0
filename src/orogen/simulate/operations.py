"""The operations of whole layers and of what comes before and after them, on one device."""

from orogen.cost.kind import costs_of
from orogen.cost.ledger import FLOAT32
from orogen.cost.local import Local
from orogen.cost.operation import Operation, memory, product


def layer_operations(letter: str, here: Local) -> list[Operation]:
    """All operations of a layer: its norm, its mixer, and the sum with the residual stream."""
    stream = here.own * here.model.hidden_size * here.itemsize
    around = [memory("norm", 2 * stream, 3 * stream, makes="norm"), memory("residual", 2 * stream, 2 * stream)]
    return [*costs_of(letter).operations(here), *around]


def end_operations(here: Local, depths: int) -> tuple[list[Operation], list[Operation]]:
    """The embedding's operations, and those of final norm, head and loss, once per depth of prediction."""
    model, plan, n = here.model, here.plan, here.tokens
    stream, columns = here.own * model.hidden_size * here.itemsize, plan.vocab_rows(model.vocab_size) // plan.tensor
    full = n * model.hidden_size * here.itemsize
    first = [memory("embedding", 2 * full, 3 * full, kernels=4)]
    chunks = 1 if plan.cross_entropy == "full" else -(-n // plan.logit_rows)
    logits = n * columns * FLOAT32
    # The head's float32 gradient is read and written once per chunk.
    head_gradient = chunks * 2 * model.hidden_size * columns * FLOAT32
    last = [
        memory("norm", 2 * stream, 3 * stream),
        product("head", n, model.hidden_size, columns, here.itemsize),
        memory("cross_entropy", 2 * logits, logits + head_gradient, kernels=6 * chunks),
    ]
    return first, last * depths


def logit_operations(here: Local) -> list[Operation]:
    """The final norm of all tokens, and the head at one position of each sequence, as an engine applies it."""
    model, plan = here.model, here.plan
    stream, columns = here.own * model.hidden_size * here.itemsize, plan.vocab_rows(model.vocab_size) // plan.tensor
    head = product("head", here.rows, model.hidden_size, columns, here.itemsize)
    return [memory("norm", 2 * stream, 3 * stream), head]


def mtp_operations(here: Local) -> list[Operation]:
    """What the multi-token-prediction block has beside its layers, for one depth."""
    size = here.model.hidden_size
    stream = here.own * size * here.itemsize
    norms = memory("norm", 6 * stream, 9 * stream, kernels=3)
    return [norms, product("mtp_projection", here.own, 2 * size, size, here.itemsize)]
