"""Training after pretraining, each kind a task (`train.task`).

**Supervised fine-tuning** (`orogen sft`): conversations, rendered by the model's chat template, whose loss is on what
the assistant says (`conversations.py`). A template that drops earlier thinking from later turns makes several texts of
one conversation: each user turn then is a sequence of its own, in which its thinking is still there.

**Distillation** (`orogen distill`, `distill.py`): a student, from a checkpoint (`--student`) or new, learns the next
tokens that a teacher expects, of text or, with a ChatConfig, of what assistants say. The teacher runs beside the
student under a plan of its own on the same devices (`teacher.py`), frozen, outside the optimizer and the checkpoints.
Its step leaves hidden states, and the student's step computes both models' logits a chunk of tokens at a time, over
ranks that share the vocabulary (`kernels/divergence`). Hidden states of the whole global batch are held, in the compute
dtype: tokens per data and context rank x the teacher's width.
`--write_logits` stores the teacher's top_k log-probabilities beside the data (`stored_logits.py`), 6 bytes each; later
runs with these data and sequence length read them by memory map, in any order of documents, and need no teacher.
Under a PrecisionConfig, which the teacher does not follow, this is quantisation-aware distillation, or with
cross_entropy alone quantisation-aware training: `gin_configs/posttrain/`. Evaluations also measure the divergence.
"""
