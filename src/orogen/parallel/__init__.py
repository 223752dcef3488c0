"""Every decision about where arrays live: meshes, logical axes, and the collectives between devices.

**Choose a plan.** `PlanConfig.data`, `context` and `tensor` lay out the dense layers, `expert` and `expert_tensor` the
experts on the same devices (MoE Parallel Folding, arXiv:2504.14960). `orogen plan` shows how; an impossible plan is
refused, and the error names the nearest legal ones. Only a vocabulary need not divide: embedding and head are padded to
a multiple of `tensor` with zeros, which stay zero and are left out of softmax, counts and exports.

**One mesh.** `fold.py` splits the ordered devices wherever the dense or the expert factorization needs a split. A
logical axis is a tuple of mesh axes; crossing from the dense to the expert axes moves no data.

**One `shard_map`** around loss and gradient, manual over every axis, with replication type-checked: a gradient summed
over the wrong group fails to trace. Parameters are marked varying once, outside the microbatch loop, so gradients are
reduced once per step (with `fsdp` `gradients` or `parameters` once per microbatch, where they are scattered).
Initialisation, clipping and optimizer stay outside, under `jit`, with the plan's shardings.

**Context ranks hold the sequence in zig-zag.** Of 2c chunks, rank r holds r and 2c - 1 - r, which balances causal
attention. The host lays batches out this way; with `ring` and `state` nothing is reordered on the devices (`allgather`
and exchanged heads restore the order first). Every layer works on the two parts in place: convolutions and shifted
targets take the few tokens before or after each part from neighbours, and the SSM's states go through a scan over the
2c parts.

**Between layers** the ranks of `tensor` split the tokens of every row (sequence parallelism) or, with
`PlanConfig.stream = 'whole'`, each holds all of them; decoding splits the rows of the batch instead (`Plan.decoding`).
Layers read from this residual stream and write to it by methods of the plan that know its layout (`plan.py`).

**Fewer heads than ranks.** Two key heads over `tensor` 4 split that axis in two: `kv_heads` is sharded over the outer
half and replicated over the inner. Mamba groups likewise; the squares of the gated norm are summed over the ranks of a
group.

**Pipelines.** `PlanConfig.stage=4`, `PlanConfig.microbatches=16` is all it takes; a run may continue from any
checkpoint with another number of stages, or without. A pipeline follows a table of ticks (`schedule.py`), which its
pictures and the training step share. `orogen plan` prints its segments, its bubble, how many microbatches it holds, and
how many layer parameters a stage has room for: for Nano on 4 balanced stages 22 % more than an even share, since the
last stage has the head and fewer experts. Put `|` into the pattern to choose the segments yourself.

A pipeline is one loop over ticks in which a stage takes the branch that its table names (`pipeline.py`). Forward and
backward passes are explicit: a forward pass writes the residuals of its `jax.vjp` into a slot of a stash, and its
backward pass reads them there. So 1F1B holds as many microbatches as its table says, however many there are, and
recomputes only what `remat` recomputes. Residuals that depend on parameters alone (slices, gathered weights) or on the
batch alone (masks) are identified in the jaxpr and recomputed.

**Microbatches that overlap.** Exchanges between ranks of `tensor` or `expert` have nothing to overlap with inside their
microbatch. With `PlanConfig.interleave = 2` the loop's body has two microbatches, which do not depend on each other.

**Stages do not meet inside a layer.** A permutation that only some devices reach waits forever, so with `stage` and
`context` above 1, `shift` must be `alltoall`. The only permutation is that of the tensors passed between stages, which
all devices reach together at the end of a tick.

**Simulated devices share few threads.** A collective of XLA:CPU holds a thread until its last participant arrives, so
a pool with one thread per device can fill with waiting ones; `runtime.py` requests four per device, and evaluation
keeps one program in flight. glibc is told to keep large blocks, which saves a quarter of a step's CPU time.

On every command, `--xla latency_hiding` overlaps communication with computation (ZeRO-1 on two H100s: 191.8 ms with it,
192.0 without), and `--xla deterministic` asks XLA for the same bits in every run; it needs attention in blocks
(`PlanConfig.attention = 'blocked'`), since cuDNN's is refused. `--xla unoptimised` is for programs on CPUs that run a
few times, as those of `orogen verify`, which takes it by itself.
"""
