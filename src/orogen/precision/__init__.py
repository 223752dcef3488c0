"""Numeric formats: which numbers are kept, and which are multiplied, in how many bits.

**Each layer has a recipe** (the class is in `config/recipe.py`): for each kind of weight, the formats of its three
products, forward and for both gradients. `PlanConfig.linear` names the recipe of all layers except the first, the last
and those of the multi-token-prediction block; `config/rounded.py` makes the emulated recipes of `PrecisionConfig`.
Layers read weights through the functions of `layers/linear.py`, which look the recipe up.

**Emulated recipes** (`PrecisionConfig`, files in `gin_configs/precision/`) round the operands of products as FP8 by
tensor or by block, MXFP8 and NVFP4 define it, on any device, layer by layer, kind by kind and product by product.
`rounding.py` has the formats, `emulated.py` and `expert_rows.py` the products. A number is rounded from exact
comparisons, so that it equals the definition to the bit; it depends on nothing but its tensor, its place in it and,
rounded at random, on seed, step and layer. So every plan, any number of microbatches, every pipeline and every
recomputation round alike. Three things make that true: a tensor of activations is one sequence (of experts' rows,
`expert_tokens` tokens of it); largest magnitudes are maxima over the ranks of context and tensor; experts' rows are
rounded in the order of their tokens, however they arrive. Blocks that would lie across ranks are refused, and so are
gradients of which each rank would round a part before the sum. Sums in another order still differ in the last bits of
float32, and behind such a sum a number may move over the midpoint of its neighbours.

`PrecisionConfig.health_every = n` measures every n-th step: the numbers that each operand loses, by layer, and the
cosine of each layer's gradient to the one without rounding (`train/lost_numbers.py`). It runs a program of its own;
other steps do not pay for it. `switch_step` changes the recipe late, such as back to bfloat16 for the last steps.
Emulated products save no time; on Hopper, `PlanConfig.linear = 'fp8'` multiplies dense products natively, with scales
of its own: one power of two per tensor and rank.

**Dense FP8 products are compiled without XLA's Triton GEMMs**, which `PlanConfig.linear='fp8'` turns off for its step:
they fuse a product with the conversions before it and multiply in 16 bits, which only a timing reveals.
`quantize='triton'` rounds a matrix and its transpose in one pass, and projections of one input (Megatron's `in_proj`,
`linear_qkv`, `linear_fc1`) share a scale. R1 is then 1.125 x as fast. FP8 products of experts were tried: rounding
costs more than they save (experiments/gpu_throughput).

**Weights as files store them** (`stored.py`): FP8 by tensor, channel or block and packed NVFP4, encoded and decoded in
numpy to the bit as the formats define it, with counters of what an encoding loses; equal to the emulated numbers.
`scaled.py` holds FP8 weights in memory for an engine (`EngineConfig.weights = 'fp8'`); products decode one at a time.
`calibration.py` measures what decides their scales and formats.

`OptimizerConfig.moment_dtype = 'bfloat16'` halves the optimizer's state.
"""
