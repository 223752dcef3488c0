"""Operations with more than one implementation: one folder per operation, the implementation chosen by name.

The implementations of an operation compute the same function at different speeds. The plainest one in each folder is
the one that the others are tested against. The defaults of `PlanConfig` run everywhere. On one H100, in bfloat16, the
fast ones are `cudnn` for attention, `mosaic` for the grouped matmul (Hopper only) and `triton` for the rest; they need
an NVIDIA GPU and raise ValueError elsewhere. Their tests run on such a GPU with
`JAX_PLATFORMS=cuda,cpu python -m pytest tests/kernels tests/precision`.

The gradients of attention, products, norms, gates, convolution and SSD are written to start from their inputs. So even
without a remat policy, a layer saves only what the formulas of arXiv:2205.05198 count: a quarter of what plain autodiff
of the same formulas saves.

Decoding (a few tokens per sequence) has its own operations, `state_update`, `replay`, `paged_attention` and
`thin_matmul`, which have no gradients, and its own implementation of the grouped matmul, `triton_small`. All of them
are memory-bound: their kernels are made to read each byte once, matrices once per 64 rows, and `orogen bench decode`
compares their times with the bound of one reading.
"""
