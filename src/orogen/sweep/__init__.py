"""`orogen sweep`: a matrix of runs, compared seed by seed.

A sweep is a recipe and a `SweepConfig`. Each arm of its matrix trains once per seed, as `orogen train` in a folder of
its own, with the budget that all arms have equal. `plan` makes the runs and checks the budgets before anything
starts; `runner` runs them, several at a time; `results.jsonl` gets a line for each finished run, and a sweep that is
called again runs only the others, each from its last checkpoint. `effects` compares the arms: differences from the
control are paired by seed, since runs of one seed share the order of their data. A difference that is not significant
is reported with the number of seeds that would detect one of its size. Processes share compiled programs through jax's
cache on disk: no program depends on the seed, but each learning rate of a search compiles a step of its own
(`experiments/packed.py` trains many short runs with one). Arms may begin with checkpoints, such as upcycled models
beside the dense one that goes on (`SweepConfig.checkpoints`), and keep further numbers (`SweepConfig.further`), each
with a table and panels of its own. `experiments/page.py` makes a page of results of several studies.
"""
