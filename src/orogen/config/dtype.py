"""Names of the dtypes that configs, commands and files take."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # per number
COMPUTE = ("float32", "bfloat16")  # of a training step, and of moments between steps
WEIGHTS = tuple(BYTES)  # of checkpoints that are opened or exported
# Numbers along the last axis of an int8 state that share a float32 scale.
STATE_BLOCK = 128


def state_bytes(dtype: str, size: int) -> int:
    """Bytes of `size` numbers along the last axis of a state that is kept in `dtype`, scales included."""
    return size + 4 * -(-size // STATE_BLOCK) if dtype == "int8" else size * BYTES[dtype]
