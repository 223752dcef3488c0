"""Which numbers are kept in which format.

**Each layer has a recipe** (`config/recipe.py`): for each kind of weight, in which format its three products are
computed, forward and for both gradients. `PlanConfig.linear` names the recipe of all layers but the first, the last and
the multi-token-prediction block's. Weights are read through the doors of `layers/linear.py`, which look it up.

**Dense FP8 products are compiled without XLA's Triton products**, which `PlanConfig.linear='fp8'` turns off for its
step: they fuse a product with the conversions before it, multiply in 16 bits, and nothing but the time tells.
`quantize='triton'` rounds a matrix and its transpose at once, and projections of one input (Megatron's `in_proj`,
`linear_qkv`, `linear_fc1`) share a scale. R1 is then 1.125 x as fast. FP8 products of experts were tried and lose to
their roundings (experiments/gpu_throughput).

`OptimizerConfig.moment_dtype = 'bfloat16'` halves the optimizer's state.
"""
