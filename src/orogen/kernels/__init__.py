"""Operations that have more than one implementation: a folder each, the implementation chosen by name.

The implementations of an operation differ in speed alone, and each folder has one that is the plainest, which the
others are tested against. The defaults of `PlanConfig` run everywhere. On one H100, in bfloat16, the fast ones are
`cudnn` for attention, `mosaic` for the grouped matmul (Hopper only) and `triton` for the others; they need an NVIDIA
GPU and are refused elsewhere. Their tests run on one with `JAX_PLATFORMS=cuda,cpu python -m pytest tests/kernels
tests/precision`.

The gradients of attention, products, norms, gates, convolution and SSD are written to start from their inputs, so that
even plain autodiff keeps what the formulas of arXiv:2205.05198 count, a quarter of what it kept before.

Decoding, a few tokens per row, has operations of its own, `state_update`, `replay` and `paged_attention`, without
gradients, and an implementation of the grouped matmul, `triton_small`. They are bound by memory, and their kernels read
what there is to read once; `orogen bench decode` times them beside that bound.
"""
