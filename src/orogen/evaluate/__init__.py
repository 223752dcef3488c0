"""Evaluation of trained models, of runs while they train, and the baselines that they have to beat.

**One forward pass.** `likelihood.py` scores rows of tokens by the pass that computes the held-out loss, on any plan,
with padded lengths from a short list so that few programs are compiled; bits per byte (`perplexity.py`), generated
suites (`suites/`) and lm-eval's requests (`harness_model.py`) are rows. `carried.py` reads long documents in pieces
instead, with states, keys and values carried. What is generated comes from `infer`'s engine, whose plan has no stages
and, with context ranks, `context_attention='allgather'` and `context_ssm='state'`. Others are refused, a run's before
it trains. A run's samples are generated on one device, whatever its plan.

**lm-eval** 0.4.13 runs in this process (`harness.py`, the extra `eval`); its numbers are those of its own Hugging Face
backend on the same weights (`tests/evaluate/test_harness_peer.py`). Chat templates are not applied. Without a network,
HF_HUB_OFFLINE=1 keeps its data sets library from looking for one.

**While a run trains**: bind `EvaluateConfig.tasks` (and `.every`, `.lengths`, `.texts` …) in its gin file. Results are
in `metrics.jsonl` as `evaluate/TASK/METRIC`, in every logger, and in the report (`during.py`).

**Add a suite**: a function of random numbers in `suites/recall.py` or `suites/texts.py`, its name in
`config/evaluate.py` and, for a suite of text, a line in `suites/run.py`.
"""
