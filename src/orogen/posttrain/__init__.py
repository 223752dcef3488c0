"""Training after pretraining, each kind a task (`train.task`).

**Supervised fine-tuning** (`orogen sft`): conversations, rendered by the model's chat template, whose loss is on what
the assistant says (`conversations.py`). A template that drops earlier thinking from later turns makes several texts of
one conversation: each user turn then is a sequence of its own, in which its thinking is still there.
"""
