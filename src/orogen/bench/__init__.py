"""Benchmarks, one per file, some of which also time a peer: a program that nobody here wrote.

`orogen bench cpu_train` times whole training steps on this CPU. `train` times forward and backward passes of a model on
one GPU, or whole steps with the optimizer (`--whole_step`). `ssd`, `grouped_matmul` and `attention` time one operation
at a named shape or at given sizes (`--shape b=2,t=8192,h=96`), after checking it against float32 or float64.
`state_update`, `replay`, `paged_attention`, `few_rows` and `thin_matmul` do the same for the operations of decoding,
`decode` for all five. `--peer torch` takes turns with the peer: torch, or transformers on our weights once the losses
agree. `--roofline FILE.png` draws a roofline, `--profile DIR` writes a trace.

**`train` keeps one run queued ahead**, and so does its peer: before each run XLA's host code spends 10 ms on buffers
and graphs (R1 on an H100). A training loop never sees that time, because it starts a step while the previous one runs.
"""
