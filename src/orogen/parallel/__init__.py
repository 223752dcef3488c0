"""Every decision about where arrays live: meshes, logical axes, and the collectives between devices.

**Choose a plan.** `PlanConfig.data`, `context` and `tensor` lay out the dense layers, `expert` and `expert_tensor` the
experts on the same devices (MoE Parallel Folding, arXiv:2504.14960). `orogen plan` shows how; a plan that cannot be is
refused with the nearest legal ones. Only a vocabulary need not divide: embedding and head are filled up to a multiple
of `tensor` with rows of zeros, which stay zero, take part in no softmax and are in no count and no export.

**One mesh.** `fold.py` splits the ordered devices wherever the dense or the expert factorization needs a split. A
logical axis is a tuple of mesh axes; crossing from the dense to the expert axes moves nothing.

**One `shard_map`** around loss and gradient, manual over every axis, with replication type-checked: a gradient summed
over the wrong group does not trace. Parameters are marked varying once, outside the microbatch loop, so gradients are
reduced once per step (with `fsdp` `gradients` or `parameters` once per microbatch, where they are scattered).
Initialisation, clipping and optimizer stay outside, under `jit`, with the plan's shardings.

**Context ranks hold the sequence in zig-zag.** Of 2c chunks rank r has r and 2c - 1 - r, so causal attention is
balanced. The host lays batches out so; with `ring` and `state` nothing is reordered on the devices (`allgather` and
exchanged heads restore the order first). Every layer works on the two parts where they lie: convolutions and shifted
targets take the few tokens before or after each part from neighbours, the SSM's states go through a scan over the 2c
parts.

**Between layers** the ranks of `tensor` share every row's tokens (sequence parallelism), or with `PlanConfig.stream =
'whole'` each has all of them; decoding shares the rows instead (`Plan.decoding`). Layers enter from this stream and
leave to it by verbs that know which it is (`plan.py`).

**Fewer heads than ranks.** Two key heads over `tensor` 4 split that axis in two: `kv_heads` is split over the outer
half and copied over the inner. Mamba groups likewise; the squares of the gated norm are summed over the ranks of a
group.

**Pipelines.** `PlanConfig.stage=4`, `PlanConfig.microbatches=16` is all it takes; a run may continue with other stages,
or none, from any checkpoint. A pipeline follows a table of ticks (`schedule.py`), the same for its pictures and the
training step. `orogen plan` prints its segments, its bubble, how many microbatches it holds, and how many parameters of
layers a stage has room for: for Nano on 4 balanced stages 22 % more than an even share, since the last stage has the
head and fewer experts. A `|` of your own in the pattern chooses otherwise.

A pipeline is one loop over ticks in which a stage takes the branch that its table names (`pipeline.py`). Forward and
backward passes are explicit: a forward pass writes the residuals of its `jax.vjp` into a slot of a stash, and its
backward pass reads them there, so that 1F1B holds as many microbatches as its table, whatever their number, and
recomputes nothing that `remat` does not. Residuals that depend on parameters alone (slices, gathered weights) or on the
batch alone (masks) are told apart in the jaxpr and recomputed.

**Stages do not meet inside a layer.** A permutation that only some devices reach waits for ever, so with `stage` and
`context` above 1 `shift` must be `alltoall`. Only what stages pass on is permuted, by all at once, at the end of a
tick.

**Simulated devices share few threads.** A collective of XLA:CPU holds a thread until its last participant has come, so
a pool with one thread per device can fill with waiting ones; `runtime.py` requests four per device, and evaluation
keeps one program in flight. glibc is told to keep large blocks, which saves a quarter of a step's CPU time.

On every command `--xla latency_hiding` overlaps exchanges with computation (not timed on GPUs yet), and `--xla
deterministic` asks XLA for the same bits run after run, with attention by blocks (`PlanConfig.attention = 'blocked'`):
cuDNN's is refused there.
"""
