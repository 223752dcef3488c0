"""Training after pretraining, each kind a task (`train.task`).

**Supervised fine-tuning** (`orogen sft`): conversations, rendered by the model's chat template, whose loss is on what
the assistant says (`conversations.py`). A template that drops earlier thinking from later turns makes several texts of
one conversation: each user turn then is a sequence of its own, in which its thinking is still there.

**Low-rank adapters** (`LoraConfig`, `gin_configs/posttrain/lora.gin`), in every task that starts from a checkpoint:
chosen weights W become x W + alpha / rank · x A B (`layers/adapter.py`), under every plan, since A and B have W's axes.
A and B alone are trained, and the parts that `OptimizerConfig.trained` names; the rest has no gradient, no moments and,
in a run in bfloat16, no float32 masters. The run's checkpoints hold both; its folder opens everywhere as the model with
A B added to W (`checkpoint/folders.py`), and `orogen convert to-peft` writes the adapters alone. A rollout's engine
computes with the factors beside the weights, as the trainer does.

**Distillation** (`orogen distill`, `distill.py`): a student, from a checkpoint (`--student`) or new, learns the next
tokens that a teacher expects, of text or, with a ChatConfig, of what assistants say. The teacher runs beside the
student under a plan of its own on the same devices (`teacher.py`), frozen, outside the optimizer and the checkpoints.
Its step leaves hidden states, and the student's step computes both models' logits a chunk of tokens at a time, over
ranks that share the vocabulary (`kernels/divergence`). Hidden states of the whole global batch are held, in the compute
dtype: tokens per data and context rank x the teacher's width.
`--write_logits` stores the teacher's top_k log-probabilities beside the data (`stored_logits.py`), 6 bytes each; later
runs with these data and sequence length read them by memory map, in any order of documents, and need no teacher; one
given by --checkpoint all the same is read once, for its tokenizer and to refuse another than wrote them.
`DistillConfig.states` also compares hidden states, after pairs of layers (`states.py`). The student then has no
pipeline stages: only the last one computes losses. The teacher never has any. Under a plan with stages its parameters
are shared among the stages' devices (FSDP), which takes as little memory, and no device waits for another stage's
microbatch; a pipeline would save the gathering of weights, and would need a schedule of forward passes alone.
Under a PrecisionConfig, which the teacher does not follow, this is quantisation-aware distillation, or with
cross_entropy alone quantisation-aware training: `gin_configs/posttrain/`. Evaluations also measure the divergence.
Under an ElasticConfig the student holds smaller models, one of which learns in each step (`compress/__init__.py`).

**Preferences** (`orogen dpo`): pairs of answers to one prompt (`pairs.py` lists the forms of a line), of which the
chosen one is to become more likely than the rejected one: DPO, IPO, their averages over tokens and an SFT term, as in
NeMo RL (`preference.py` has the formulas). Both answers of a pair are in one row, so a pair never crosses data ranks or
microbatches; sums over a document are reduced over `context` before anything that is not linear (`documents.py`, for
any loss of whole answers). `TrainConfig.batch_size` therefore counts rows, each with as many pairs as fit. The
reference model is the run's own first state: its log-probabilities are computed before the first step and kept in
RUN/reference (`reference.py`), so there is no second model in memory. The multi-token-prediction block is not trained,
and weight decay would shrink it.

**Reward models**: `PreferenceConfig.loss = 'bradley_terry'` trains a scalar head (`ModelConfig.score_head`) beside the
head of the vocabulary, on the score at each conversation's last token; from a language model's checkpoint it begins
with a new head. `orogen reward` scores conversations, `orogen best_of` keeps the best of several answers. `genrm.py`
has what a generative reward model is shown and writes, its reward in training, and the rewards of answers that it
compared: functions for environments of one's own, which no command runs.

**Reinforcement learning** (`orogen rl`, `rl.py`): group-relative policy optimisation on `environments/`. A run's source
of batches (`source.py`) draws tasks (`curriculum.py`), lets the weights that are about to train answer each of them
several times (`groups.py`, `rollout.py`), has the answers verified, and packs them with their advantages
(`advantages.py`, `samples.py`) for the objective (`objective.py`); step, loop and plans are those of every task.

- *One model for both sides.* Without staleness, and unless `server` is set, the engine reads the arrays that train, so
  nothing is sent and no weight is copied on one plan. Before each update the trainer computes the log-probabilities of
  all chosen tokens itself (`likelihood.py`); the difference from the rollout's is in every record (`mismatch_mean`,
  `mismatch_max`), and corrects or masks tokens by `RLConfig.importance` and `sequence_error`. With `RLConfig.exact`
  these log-probabilities come from programs that round as decoding does (`infer/exact_scores.py`), and the difference
  is exactly 0 in float32. The pass that makes the gradient is over packed rows and still differs by rounding: `gap`
  says by how much.
- *Distillation on policy* (`teachers.py`), as of Nemotron 3 Ultra (MOPD): an environment may name the checkpoint of
  its teacher. The policy then learns log π_teacher - log π of each token that it wrote there, in place of rewards,
  under the same clips and masks; `teacher_divergence` says how far it is. Other environments keep their rewards.
- *A run that is killed goes on to the bit*, without staleness, and counts no sample twice: seeds derive from the run's
  seed, the number of the rollout, and the place in it; the engine takes new weights as if it were new. Batches that are
  left of a rollout with several updates are part of the checkpoint.
- *Held-out tasks* ask no question that is trained on (`task_split.py`), unless an environment has fewer than 20
  different ones: `env.json` and the log then say so.
- *What has no gradient is counted*: groups with equal rewards (`zero_gradient_groups`), failed verifications and
  rewards that are no numbers (`failed_verifications`, `faults/KIND`; in no baseline), overlong answers, masked tokens.
  So are the parts of rewards that are no metric (`reward_parts_left_out/ENVIRONMENT`).
- *Mixtures of experts*: `OptimizerConfig.frozen = ('router', 'mtp')` keeps these as they are, while correction biases
  are still updated, as in Nemotron 3 Nano's recipe.
- *Router replay* (`RLConfig.router_replay`): the engine reports the experts of every token that it reads, as the
  layers kept them, and the trainer's passes, of log-probabilities and of gradients, take these in place of their own
  choice. Weights of experts are the trainer's. A last token, which no engine reads, and the model of KL route by
  themselves. In a later turn of an episode, the engine reads earlier answers again; tokens keep the experts with which
  they were written. Not for plans with stages or, in the engine, with tensor or context. A server
  needs `EngineConfig.report_experts = True` and `.prefix_cache = False`.
- *Ahead* (`RLConfig.staleness`, `ahead.py`): a thread writes the next batches while the trainer updates, at most so
  many ahead, on one device or by a server. Weights are handed over between two calls of decoding, and answers go on
  with caches of older ones; every token has the log-probability of the weights that chose it, so that `importance`
  corrects what is off-policy too. Records say how old the weights were (`staleness_mean`, `staleness_max`, in batches)
  and how many answers are of several (`mixed_answers`). When weights change is decided by the clock, so such a run does
  not repeat to the bit; what was in flight when it ended is written again, and never counts twice.
- *By a server* (`RLConfig.server`, `remote.py`): `orogen serve --weights FOLDER` answers over HTTP, token ids in and
  out. The weights go through FOLDER as checkpoints, onto whatever plan the server has. With the settings of the engine
  in the process and one slot, a run is the same to the bit. Requests that the server refuses for now (408, 409, 425,
  429, 502, 503, 504), drops or answers late are sent again (`calls.py`, `server_retries`); a server that is busy or
  starts is waited for until `server_deadline`. One that was started anew gets the weights again, and nothing that it
  began before counts. A run ends with one line where all that is in vain.
- *Low-rank adapters and KL*: the model that KL refers to is the run's own without its adapters; where more is trained,
  it is the first checkpoint's, a second model in memory.
- *Not built*: rollouts under a PrecisionConfig, which is refused.
- `rollouts/NUMBER.jsonl` of the run folder holds some samples of each batch to read, with rewards and advantages.
"""
