"""Training: loss, optimizer, step, loop, and what a run folder holds.

**`orogen verify` compares a plan with one device** that has the plainest kernels, one batch and no recomputation. Its
single device stands for the plan's ranks and microbatches when it counts capacity. The plan replays which experts the
single device chose and what it dropped, since rounding flips ties; `verify` reports how many tokens would have fared
otherwise and by what margin.

**Add a task.** What pretraining, fine-tuning, distillation and reinforcement learning do each in its own way is one
value, a `Task` (`task.py`); step, loop, pipeline and `verify` are the same for all. Its `Objective` names sums and what
they are divided by, both of one device's rows: the loss is a weighted sum of these means, so it is the same under every
plan and any number of microbatches, which is why a loss is never written as a mean. `sums` is given the final hidden
states and reads the head by `orogen.model.heads`: weighted nats, or each token's log-likelihood. What the loss needs
beside tokens and weights (advantages, a teacher's log-likelihoods) comes with the batch, as `Batch.extras` by name,
arrays (b, t, …). `source` gives batches and can be stopped and restored to the bit; `evaluation` scores a state.
`pretraining.py` is the task of `orogen train`; `tests/train/test_task.py` writes another, a policy gradient, works its
numbers by hand, and holds it against one device under several plans.

**Muon** is scaled to AdamW's update size (0.2·√max(in, out), arXiv:2502.16982), so one learning rate serves both.

**An offloaded optimizer frees memory between steps, hardly within one**: XLA:GPU fetches all of it when the step
begins, in whatever order the program asks (experiments/activation_memory).
"""
