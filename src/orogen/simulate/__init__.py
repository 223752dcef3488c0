"""What a run costs, computed before it starts and without allocating arrays.

**`orogen simulate`** predicts a training step of a plan on a cluster, or an engine's speed, from the configs alone; no
jax, about a second. `predict` joins

- `operations`: each layer's products and bytes on one device; `roofline` times them, `hardware` has peaks, links and
  the shares of them that programs reach: one set of constants per kind of hardware, with sources and what they were
  fitted on; `PROGRAMS` says what a program hides and waits for, and `program` what it adds: kernels that its host
  launches one by one, casts to 8 bits, parameters gathered again;
- `links`: the ledger's collectives (`orogen.cost`) on nodes and the network between them, with experts folded;
- `passes`: a microbatch through a chunk, with what of its traffic is exposed; `pipeline` plays the schedule's own
  table, so that bubbles, uneven stages and the MTP block on the last stage come out of it;
- `shapes`: the lengths of a run's phases; memory is that of the worst, the budget that of all;
- `footprint`: what each stage's devices hold; `routing`: how evenly experts are chosen, which every prediction names;
  `budget`: failures, hours, kWh, dollars; `decode`: inference.

`search` ranks all legal plans; `page` draws a prediction, its `scaling` and a ranking on one page (`--html`);
`compiled` compares a prediction with the real step, compiled for simulated CPU devices or, with the extra `cuda`, for
a GPU that need not exist (`target`): with its kernels, though XLA then tries none of its own and knows no workspaces of
cuDNN. `layout` ends a process that compiles as soon as its program's memory is known, before code is generated.
Runs with adapters, teachers, submodels, images, pairs, rollouts or emulated rounding are refused. `predict` itself
counts tokens' work alone in layers `x`, and neither the resampler nor its activations, which lie in every row's room
for images (`data/images.py`).
What the constants cannot know: a program's version (published steps of one model on the same devices differ by 1.5),
and whatever a device does beside the step.

**`orogen plan`**, with a `TrainConfig`, lists what one device sends, by the formulas of `orogen.cost`. `--compile`
compiles one layer of each kind in float32 for simulated devices; it prints XLA's collectives beside that table, and the
plan's matrix products against one device's. `--memory` compiles the whole step and prints what one device holds:
parameters, gradients, optimizer state, activations by name, temporaries; of the phase that needs most memory.

`fit` refuses what cannot fit into memory, before anything is allocated.
"""
