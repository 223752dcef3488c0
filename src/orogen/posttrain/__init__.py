"""Training after pretraining, each kind a task (`train.task`).

**Supervised fine-tuning** (`orogen sft`): conversations, rendered by the model's chat template, whose loss is on what
the assistant says (`conversations.py`). A template that drops earlier thinking from later turns makes several texts of
one conversation: each user turn then is a sequence of its own, in which its thinking is still there.

**Reinforcement learning** (`orogen rl`, `rl.py`): group-relative policy optimisation on `environments/`. A run's source
of batches (`source.py`) draws tasks (`curriculum.py`), lets the weights that are about to train answer each of them
several times (`rollout.py`), has the answers verified, and packs them with their advantages (`advantages.py`,
`samples.py`) for the objective (`objective.py`); step, loop and plans are those of every task.

- *One model for both sides.* The engine reads the arrays that train, so nothing is sent and no weight is copied on one
  plan. Before each update the trainer computes the log-probabilities of all chosen tokens itself (`likelihood.py`); the
  difference from the rollout's is in every record (`mismatch_mean`, `mismatch_max`), and corrects or masks tokens by
  `RLConfig.importance` and `sequence_error`. With `RLConfig.exact` these log-probabilities come from programs that
  round as decoding does (`infer/exact_scores.py`), and the difference is exactly 0 in float32. The pass that makes the
  gradient is over packed rows and still differs by rounding: `gap` says by how much.
- *A run that is killed goes on to the bit* and counts no sample twice: seeds derive from the run's seed, the number of
  the rollout, and the place in it; the engine takes new weights as if it were new. Batches that are left of a rollout
  with several updates are part of the checkpoint.
- *What has no gradient is counted*: groups with equal rewards (`zero_gradient_groups`), failed verifications and
  rewards that are no numbers (`failed_verifications`, `faults/KIND`; in no baseline), overlong answers, masked tokens.
- *Mixtures of experts*: `OptimizerConfig.frozen = ('router', 'mtp')` keeps these as they are, while correction biases
  are still updated, as in Nemotron 3 Nano's recipe.
- `rollouts/NUMBER.jsonl` of the run folder holds some samples of each batch to read, with rewards and advantages.
"""
