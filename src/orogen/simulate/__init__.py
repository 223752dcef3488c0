"""What a run costs, from its config alone; touches no array.

With a `TrainConfig`, `orogen plan` lists what one device sends: for each layer type the operations, axes and bytes,
forward, recomputed, backward and once per step. `--compile` compiles one layer of each type on simulated devices in
float32 and prints XLA's collectives beside the table, and the plan's matrix products against one device's. `--memory`
compiles the whole step and prints what one device holds: parameters, gradients, optimizer, activations by name,
temporaries.

**The table of collectives is exact, XLA's program has at most that**, except for what a pipeline's backward passes
exchange of the batch again. The jaxpr of every unit equals the table, with each context method and dispatch. In the
compiled program XLA:CPU merges equal exchanges (of segments, or repeated by remat) into one, and gathers where it lacks
the ragged all-to-all; anything else that it has more, fewer or larger fails a test.
"""
