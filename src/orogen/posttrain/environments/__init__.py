"""Environments of reinforcement learning: tasks whose answers a program verifies.

**One interface** (`interface.py`): an environment has numbered tasks (`example`), and `step` says what comes of
what the model said: replies, such as the outputs of tools, after which it goes on, or named rewards, whose sum is the
reward. Everything is a pure function of its arguments, with states as plain JSON: a rollout that is repeated has the
same rewards.

**Verifiers are not trusted.** `pool.py` runs them in processes of their own (`worker.py`), with a deadline and limits
on memory and output; one that crashes, hangs or floods, or whose reward is not a finite number of at most 1e9 in size,
is counted, and its sample is left out of the loss and of its group's baseline. Programs that a model wrote run in
`sandbox.py`, one bubblewrap each, beside their checks, which run in another process (`checked.py`). All other verifiers
read answers and run none: a data set of `reasoning_gym` whose scorer evaluates answers as Python is refused. An
environment that cannot run, or that has no answer many times in a row, ends the run.

**Add a kind**: a class with the four methods, its name in `config.rl.KINDS` and `make.MAKERS`.

| kind | tasks | reward |
|---|---|---|
| synthetic | eight small families, exact answers | 1, or `partial_credit` for the form |
| reasoning_gym | data sets of that package whose scorers run no answer | its own score |
| code | a file, or small functions | 1 if all unit tests pass |
| json_schema | a file, or generated schemas | 1 if the answer is JSON of the schema |
| instructions | a file, or generated ones | 1 if all checks hold |
| workplace | people, meetings, tickets, mails; ten tools | 1 if the database is as it should be |
| nemo_gym | a file of NeMo Gym, whose tools and verifier a resources server has (`gym.py`) | the server's |

**NeMo Gym's contract** the other way: `orogen environments serve` is a resources server of the environments of a gin
file (`server.py`), and `orogen environments write` writes their tasks as data sets of Gym's agents.
"""
