"""Numeric formats: which numbers are kept, and which are multiplied, in how many bits.

**Each layer has a recipe** (`config/recipe.py`): for each kind of weight, the formats of its three products, forward
and for both gradients. `PlanConfig.linear` names the recipe of all layers except the first, the last and those of the
multi-token-prediction block. Layers read weights through the functions of `layers/linear.py`, which look the recipe up.

**Dense FP8 products are compiled without XLA's Triton GEMMs**, which `PlanConfig.linear='fp8'` turns off for its step:
they fuse a product with the conversions before it and multiply in 16 bits, which only a timing reveals.
`quantize='triton'` rounds a matrix and its transpose in one pass, and projections of one input (Megatron's `in_proj`,
`linear_qkv`, `linear_fc1`) share a scale. R1 is then 1.125 x as fast. FP8 products of experts were tried: rounding
costs more than they save (experiments/gpu_throughput).

`OptimizerConfig.moment_dtype = 'bfloat16'` halves the optimizer's state.
"""
