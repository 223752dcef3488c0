"""Generated tasks that need no download: recall, copying and long contexts, at any length, with any tokenizer.

Each example is a function of (EvaluateConfig.seed, suite, length, number): other examples, suites and lengths do not
change it. Prompts are worded here; each suite's docstring names the paper that defined it.

**How answers are scored.** Suites in `config.evaluate.SCORED` have one right answer, token by token. They are scored in
one pass: `accuracy` is the share of examples whose answer greedy decoding would write whole, `token_accuracy` that of
the tokens it would write given the true ones before, `nats` the mean per answer token. Suites in `WRITTEN` are
continued by the engine: `recall` is the mean share of the answers that occur in the continuation, whatever their case,
as RULER counts (arXiv:2404.06654), and `accuracy` the share of examples in which all do. A metric's name ends with the
length: `accuracy@4096`.
"""
