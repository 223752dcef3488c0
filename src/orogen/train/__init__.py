"""Training: loss, optimizer, step, loop, and the contents of a run folder.

**`orogen verify` compares a plan with one device** that uses the plainest kernels, one batch and no recomputation. That
device counts expert capacity as the plan's ranks and microbatches would. The plan replays the single device's choices
of experts and its drops, because rounding can change which of two nearly tied experts wins; `verify` reports how many
tokens would have chosen otherwise, and by what margin.

**Add a task.** What differs between pretraining, fine-tuning, distillation and reinforcement learning is one value, a
`Task` (`task.py`); step, loop, pipeline and `verify` are the same for all. Its `Objective` returns named sums, and the
denominator of each, over the tokens of one device. The loss is a weighted sum of the resulting means, so it is the same
under every plan and any number of microbatches; for that reason an objective never takes a mean itself. `sums` receives
the final hidden states and reads the head through `orogen.model.heads`: as a weighted sum of negative log-likelihoods,
in nats, as the log-likelihood of each token, or, for a metric without a gradient, as whether the token is the likeliest
(`judge`). Position i of a batch predicts token i + 1: `next_token.targets` and `target_weights` shift tokens and
weights under every plan, `parallel.context.later` anything else, since the next token may be on another rank of
`context`. What the loss needs beside tokens and weights (advantages, a teacher's hidden states) comes with the batch,
in `Batch.extras`: named arrays (b, t, …), from the source or from a `FrozenModel` that runs beside the trained one.
`source` yields batches, and its position can be saved and restored to the bit; `evaluation` scores a state:
`heldout.measure` by forward passes alone, under `heldout.heldout_plan`, of parameters from `placement.working` and
batches from `step.batch_to_devices`; fetch each result before the next pass begins. `pretraining.py` is the task of
`orogen train`. A script calls `parallel.runtime.configure(fake_devices=N)` before anything imports jax, reads config
and text by `config.load.load([FILE], BINDINGS)`, and calls `train.run.train(config, text, DIR, TASK)`, with
`resume=True` to continue. `train.verify.verify(config, objective=…, batches=…)` compares loss and gradients under a
plan with one device's; `batches(config, count)` adds the extras that the objective reads to those of
`sides.packed_batches`. A command of its own is a `Command` in its package's `command.py`, listed in `cli.py`; its
fields are a config class in `orogen.config`. `tests/train/test_task.py` defines another task, a policy gradient, checks
it against values computed by hand, and compares several plans with one device.

**Muon** is scaled to AdamW's update size (0.2·√max(in, out), arXiv:2502.16982), so one learning rate serves both.

**A run survives** (`tests/train/kills.py`, `experiments/survival`): after a kill, a stop or a full disk, it continues
with the same bits. Checkpoints are written in the background every `checkpoint_every` steps,
`checkpoint_minutes` and, with `keep_best`, after the best evaluation (`saving.py`); the last `keep_checkpoints` stay,
as do the best one and the one to which a run would roll back. If a checkpoint cannot be written, a line says so and
training continues, as it does while `metrics.jsonl` cannot be written; only the last checkpoint of a run must succeed.
Bad steps (`health.py`) are those that were not finite, which change nothing, and spikes of the loss; after
`roll_back_after` of them, the run rolls back and continues with later data (`back.py`). A run without progress for
`hang_minutes` writes its stack traces and ends with status 1 (`watch.py`). `stragglers.py` names slow processes;
`goodput.py` times what is not a step, and `report.html` shows where the time went.

**An equal run starts sooner** with `TrainConfig.keep_program`: the traced and lowered step is kept in a file
(`parallel/kept.py`) beside jax's compile cache, which alone saves only XLA's part.

**An offloaded optimizer frees memory between steps, hardly within one**: XLA:GPU fetches all of it at the start of the
step, in whatever order the program asks for it (experiments/activation_memory).
"""
