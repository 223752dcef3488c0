"""Models made from models: (config, params) → (config, params).

A command here reads any checkpoint folder and writes an Orogen checkpoint folder. `rewrite` goes through the new model
one parameter of one layer at a time, so that models larger than memory pass; a command says how a layer of the new
model is made from one of the old.

**Pruning** has four steps, each a file:

- `calibrate.py` runs the model over text, on any plan without stages, and adds up what layers report. Stages are
  refused: `fsdp` shares the parameters as well, and scores of layers compare final states of passes without each layer,
  which would leave stages idle. A layer that is
  given a `Probe` (`layers/probe.py`) keeps statistics of its activations, or has its output multiplied by zero, so that
  one program measures the model without any of its layers.
- `importance.py` and `depth.py` turn the sums into scores of units and of layers (Minitron, arXiv:2407.14679; for Mamba
  arXiv:2504.11409; MiniPuzzle, arXiv:2504.03624). Minitron looks at a unit's activation, before the matrix that reads
  it. `outgoing.py` adds that matrix: a unit that nothing reads has score 0, and with PruneConfig.width_scores =
  'contributions' every score is multiplied by the norm of the unit's outgoing weights.
- `choose.py` takes the best under the constraints: heads inside the group of their key head, Mamba's inside the group
  that shares B and C, experts inside their routing group; and refuses sizes that groups or ranks do not divide.
- `slices.py` cuts each parameter. Norms are rescaled so that channels of zeros leave no trace.

The new folder has `pruning.json`, with what was kept and how it was scored, and `pruning.npz`, with the scores of units
(`stored_scores.py`). `--scores` prunes the same model to other sizes by them, without reading text or running the
model, so on a host that cannot hold it. It refuses scores of other weights, and scores taken in another way than
PruneConfig asks for. If layers were scored one by one, `removal.jsonl` has the scores for `orogen search`, and with
PruneConfig.scored_sizes those of narrowing one MLP alone: MiniPuzzle's replace-one scores. Layers of gated
cross-attention (x, g) and the heads of reward models have no rules, and are refused.

Text comes from `DataConfig`, sizes from `PruneConfig`, such as PruneConfig.mamba_num_heads = 48 in narrow.gin:

    orogen prune --checkpoint runs/base --gin_file gin_configs/data/stdlib.gin --gin_file narrow.gin --out pruned

The head size of attention, Mamba's groups and its state size stay. No published model changes them: Nemotron-H 4B and
47B, Nano 2 9B and Nemotron 3 Nano 4B are their parents with other patterns, hidden sizes, MLPs and numbers of Mamba
heads. Rotary channels go in pairs that a ranking of channels would split, and heads of a group share B and C.

Multi-token prediction: the block's layers are pruned in width like the others, and are never removed. A pattern loses
its pipeline segments (`|`) if layers are removed.

**Post-training quantisation** (`orogen quantize`) stores the weights of the layers' products in FP8 or NVFP4. What is
kept higher is data (`QuantizeConfig.keep`; gin_configs/quantize has the published recipes for weights and inputs).

    orogen quantize --checkpoint HF_FOLDER --format nvfp4 --text calibration.jsonl --out quantised
    orogen evaluate --checkpoint quantised --text README.md
    orogen convert to-hf quantised HF_QUANTISED

`sensitivity.py` runs calibration text through the model, on any plan without pipeline (with NVFP4, each rank's share of
a weight's inputs must be a multiple of 16): each product tells the largest magnitude of its input, over all tokens and
devices, which becomes its static scale; and, for AutoQuantize, the error of its output under each format, weighted by
the gradient (`precision/calibration.py`). `allocate.py` chooses formats under a budget of bits. `quantised_folder.py`
writes the tensors as NVIDIA/Model-Optimizer stores them. They are then read again, and their loss on other text is
measured with the inputs of products rounded as well. The folder appears once all of this is done; `quantization.json`
and `quantization.png` in it say what was chosen, layer by layer.

With `QuantizeConfig.key_values = 'fp8'`, keys and values are calibrated too (`cache_scales.py`): the layers are given
caches with room for a whole batch, and the largest magnitudes of what they keep become `k_scale` and `v_scale` of each
attention layer. The measured loss is then that of a model that attends to rounded keys and values.

An engine reads these scales if `EngineConfig.key_values` is 'fp8'. Every other command computes with the decoded
weights in its compute dtype, and rounds neither inputs nor keys and values.

**Search** (`orogen search`, no jax): which smaller model to make. `candidates` enumerates widths and numbers of layers
and counts parameters, active parameters and the bytes of a context; `speed` has the simulator's tokens per second and
memory; `search` ranks what keeps the budgets (`config/search.py`). With scores of removing layers (`removal`) the least
important go first; with scores of replacing one layer at a time (`scores`), `puzzle` chooses by integer programming.
`gin_configs/search/` has the budgets that Nemotron Nano 2 and Nemotron-H 47B were carved under;
`experiments/carving_nano2` shows where the published models stand among the candidates. The best one is written as a
gin file (`--out`).

Which of the best is best, training says. Two commands carve a model: `orogen prune` to any size, for the scores, and

    orogen search --gin_file budgets.gin --checkpoint base --scores pruned --training light.gin --run carved

`retrain` then prunes each of the best candidates, distils it as light.gin says (a config of `orogen distill`), ranks
them by the loss of held-out text, and, with `--winner long.gin`, distils the best one on. Each step is a command of its
own, and a search that was stopped goes on (`ranking.jsonl` in the folder has what is known).

**Elastic models** (`orogen distill` with an ElasticConfig): one model that holds smaller ones (arXiv:2511.16664).
`orogen prune` with the model's own sizes sorts its units by importance. Training then takes one budget per step: a
router chooses the sizes, the first units of each kind stay, and the submodel learns from the whole, frozen model.

    orogen prune --checkpoint runs/base --gin_file my_text.gin --gin_file own_sizes.gin --out sorted
    orogen distill --checkpoint runs/base --student sorted --gin_file my_budgets_and_training.gin --run runs/elastic
    orogen prune --checkpoint runs/elastic --gin_file runs/elastic/budget_0.5.gin --out half

- *Masks multiply parameters* (`nested.py`), before the plan's layout is gathered, so that layers and collectives are
  those of every run: any plan without stages. Two places ask what is absent (`Plan.nested`): RMS norms count the
  channels whose weight is not 0, and routers leave out experts whose gate is 0. A run whose model has such zeros at
  its start is refused. A layer that is removed has no first row in its gate, so that it adds no losses of routers.
- *A slice equals its mask.* What is left of the masked parameters has the bits of the slice, for every size and letter
  that pruning knows; absent units add exact zeros. Logits then have the same bits if both shapes are summed in the
  same order, and no expert drops tokens. On XLA:CPU in float32 that holds operation by operation in layers M, *, E and
  - for hidden_size, heads, MLPs, shared experts, numbers of experts and layers, at multiples of 32
  (`tests/compress/test_nested.py`); not for mamba_head_dim, the widths of routed experts and of the latent, and layers
  w, + and m, where other shapes have other kernels. Programs compiled for two shapes may also fuse differently. The
  difference is at most 1e-6 of the logits' range.
- *The router* (`elastic.py`) is no part of the model: it is in checkpoints' trainer item, and the run ends by writing
  `budget_SHARE.gin`, the likeliest sizes that keep each budget. Evaluations score every budget.
- *Not built*: choices that differ between layers, samples that differ between microbatches, pipelines, a choice of
  hidden_size with norms other than `rms`, and sizes for budgets that were not trained.
"""
