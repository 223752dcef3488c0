"""The models: Flax NNX modules that know logical axis names but no mesh.

**Repeated layers** are scanned. `block.py` folds the pattern into nested repetitions with the fewest distinct layers:
the 52 layers of Nemotron 3 Nano compile as 10.

**Layer types differ by configuration**, not by class: attention (`*`, with a window `w`) has rotary positions with
YaRN, QK-norm, biases and sinks as its config says; MLP and experts are gated or not; routers score by sigmoid or
softmax. A second class exists only where the mathematics differs (`+`, DeepSeek's latent attention; `m`, Mamba-1).

**Recomputation goes by names.** A layer under a policy of names saves its input and every named intermediate except
those chosen (`config/remat.py` lists the names, Megatron's modules among them).

**Stages.** A stage keeps its layers by letter, one array per parameter; the array has as many rows as the chunk with
the most layers of that letter, so if stages have different layers, they hold rows of zeros (if each of four stages has
a layer type of its own, each holds as much as one device would). Embedding and head are one array over the stages:
stage 0 holds the embedding in its row, the last stage holds the head. An array has the same shape on all devices of a
mesh, so the stages in between have room for one too. If the last stage needs both (tied, or with an MTP block, which
embeds too), each is on every stage, as are the block's own matrices, and their gradients are summed over the stages.
State from a run with other stages, and a whole model's initial parameters, are split over the stages' devices until
they are laid out by stage.

**Mamba-2's time step is clipped only to a checkpoint's `time_step_limit`** (`ModelConfig.time_step_min`,
`time_step_max`). transformers 5.23 clips at its `time_step_min` when it reads a whole sequence, but not when it
decodes; tests undo the former.

**Images.** `x` attends to the images of a row, `g` is a tanh-gated MLP after it (`cross_attention.py`); both begin as
the identity. One perceiver resampler (`resampler.py`), a part of the model like the embedding, computes the vectors
that all layers `x` are `given`; every stage with such a layer has a copy of it.

**Add a layer.** A layer is one letter of the pattern. Write the mixer here:

- Parameters, in `__init__`, through `orogen.layers.parameter`, each with its logical axis names. The names are those of
  `parallel/axes.py`: `mlp` and `mamba_heads` are split over `tensor`, `embed` by FSDP, `taps` and `state` by nothing. A
  new name goes there and, if every plan splits it, into `SPLIT` of `cost/ledger.py`.
- The forward pass, `__call__(h_btd, docs, plan, given) -> (y_btd, kept)`, in one device's shapes, which communicates
  only through `plan.enter`, `plan.leave`, `plan.sum`, … Give large intermediates names (`checkpoint_name`), so that
  they can be saved or recomputed.
- The cache: `start(allocator, dtype)` returns the empty one that `__call__` receives as `given` with the first piece of
  a sequence (consecutive tokens that one call reads), `cache_axes(allocator)` its logical axes, and `kept` is the cache
  after the piece. An allocator (`cache.Rows`, `slots.Slots`) makes caches of keys and values and of recurrent states; a
  mixer may also return a class of its own with a method `with_piece`, or None if it has no memory. When pruning
  measures, `given` is a `Probe` (`layers/probe.py`): a mixer takes it off with `probe_of` and, if it is `measuring`,
  returns statistics or `{}`.
- A causal convolution calls `context_ssm.convolve`, which supplies the tokens before a piece or before a rank's part,
  and with a cache stores its new window by `context_cache.with_inputs` (`mamba1.py` is the shortest example). With a
  cache, a recurrence is computed by `given.ssd` or `given.selective_scan`, which also do the engine's rounding, replay
  and roll-back; without one by its kernel, or over ranks of `context` by the functions of `context_ssm.py`.

`layers/mlp.py` is the shortest mixer.

Then write what the layer costs, an `orogen.cost.kind.LayerCosts`, in a file of `orogen/cost/kinds/`: operations,
parameters, bytes kept, collectives, caches. `mlp.py` there is the shortest; `collectives.block` is what `enter` and
`leave` send, `mamba2.halos` what a convolution sends between ranks of `context`. Last, add one row to `LAYERS`
(`config/kinds.py`): the letter, its name, where mixer and costs are, the fields that it reads, which of them `tensor`
splits and which one holds a convolution's taps, its intermediates, and the kinds of weight to which low-rank adapters
and low-precision formats refer. A new field belongs in `ModelConfig`, with the checks that need no plan. All other code
finds the layer through its row; `kind_of` refuses a letter without one.

Three things that not every layer has are defined elsewhere: names of tensors in Hugging Face checkpoints
(`convert/mixers.py`), without which `orogen params` shows no tensors; and for pruning the units, in a table to which
the row refers (`compress/slices.py`), and their importance scores (`compress/importance.py`).

Run `orogen verify` on a pattern that has the layer; `tests/model/test_add_a_layer.py` adds one in this way, and checks
that what rows refer to exists.
"""
