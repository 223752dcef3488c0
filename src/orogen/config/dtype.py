"""Names of the dtypes that configs, commands and files take."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # per number
COMPUTE = ("float32", "bfloat16")  # of a training step, and of moments between steps
WEIGHTS = tuple(BYTES)  # of checkpoints that are opened or exported
