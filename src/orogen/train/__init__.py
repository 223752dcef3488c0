"""Training: loss, optimizer, step, loop, and what a run folder holds.

**`orogen verify` compares a plan with one device** that has the plainest kernels, one batch and no recomputation. Its
single device stands for the plan's ranks and microbatches when it counts capacity. The plan replays which experts the
single device chose and what it dropped, since rounding flips ties; `verify` reports how many tokens would have fared
otherwise and by what margin.

**Muon** is scaled to AdamW's update size (0.2·√max(in, out), arXiv:2502.16982), so one learning rate serves both.

**An offloaded optimizer frees memory between steps, hardly within one**: XLA:GPU fetches all of it when the step
begins, in whatever order the program asks (experiments/activation_memory).
"""
