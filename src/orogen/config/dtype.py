"""Names of the dtypes that configs, commands and files take."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # per number
COMPUTE = ("float32", "bfloat16")  # a step computes in these and keeps moments in them
WEIGHTS = tuple(BYTES)  # a checkpoint is opened and exported in these
