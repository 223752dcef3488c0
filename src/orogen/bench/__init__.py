"""Timings, one file per benchmark, beside programs nobody here wrote.

`orogen bench cpu_train` times whole training steps on this CPU; `train` times passes of a model on one GPU, or with
`--whole_step` steps with the optimizer; `ssd`, `grouped_matmul` and `attention` time one operation at a named shape or
at sizes (`--shape b=2,t=8192,h=96`), checked against float32 or float64 first. `--peer torch` runs the peer in turn:
torch, or transformers on our weights once the losses agree. `--roofline FILE.png` draws, `--profile DIR` traces.
`state_update`, `replay`, `paged_attention` and `few_rows` do the same for the operations of decoding, `decode` for all
of these at once.

**Whole models are timed with one run ahead**, the peer too: before each run XLA's host spends 10 ms on buffers and
graphs (R1 on an H100), which a training loop never sees, for it starts a step while the one before is at work.
"""
