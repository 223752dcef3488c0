"""What a layer computes, holds and sends, from configs; no array is allocated.

Training and checkpoints build on this package: `assemble` gives the plan of a config and the model laid out for it, in
stages balanced by `flops`, with which training also reports its utilisation. The cost of a whole step or task is in
`orogen.simulate`.

**Kinds of layers.** `kinds/` has a file for each kind of layer with all that one such layer costs; `config/kinds.py`
says which letter has which. `flops`, `weights`, `kept` and `communication` add them up for models on plans.

**Shapes are stated twice**: where a module makes its parameters, and in `kinds/` and `weights`, which need no jax. A
test compares them for every shipped model and each option. `conventions` counts FLOPs as published tables do.

**Communication is counted twice.** `communication` is an analytic table: for each kind of layer the operations, axes
and bytes, forward, recomputed, backward and once per step. Tests compare it with the jaxpr of every unit, which must
be equal, with each context method and dispatch; and with the compiled program, which may send at most as much, except
that a pipeline's backward passes exchange parts of the batch again. XLA:CPU merges equal exchanges (of segments, or
repeated by remat), and all-gathers instead of the ragged all-to-all that it lacks; any other difference fails a test.

**What is kept** for the backward pass is read from the trace of a layer, by name (`activations`), and computed from
the configs (`kept`); tests compare the two.
"""
