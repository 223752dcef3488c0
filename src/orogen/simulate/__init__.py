"""What a run costs, computed before it starts and without allocating arrays.

With a `TrainConfig`, `orogen plan` lists what one device sends, by the formulas of `orogen.cost`. `--compile` compiles
one layer of each kind in float32 for simulated devices; it prints XLA's collectives beside that table, and the plan's
matrix products against one device's. `--memory` compiles the whole step and prints what one device holds: parameters,
gradients, optimizer state, activations by name, temporaries.

`fit` refuses what cannot fit into memory, before anything is allocated.
"""
