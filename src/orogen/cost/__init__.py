"""What a layer computes, holds and sends: from configs and from the model's abstract modules, without an array.

Training and checkpoints stand above: `assemble` gives the plan of a config and the model laid out for it, in stages
that are balanced by `flops`, by which training also reports its utilisation. What a whole step or a task costs is in
`orogen.simulate`.

**Shapes are stated once**, where a module makes its parameters; `weights` reads them there, with their logical axes.

**What is sent is counted twice.** `communication` is a table by formula: for each kind of layer the operations, axes
and bytes, forward, recomputed, backward and once per step. The jaxpr of every unit equals it, with each context method
and dispatch; what XLA compiles has at most that, except for what a pipeline's backward passes exchange of the batch
again. In the compiled program XLA:CPU merges equal exchanges (of segments, or repeated by remat) into one, and gathers
where it lacks the ragged all-to-all; anything else that it has more, fewer or larger fails a test.

**What is kept** for the backward pass is read from the trace of a layer, by name (`activations`).
"""
