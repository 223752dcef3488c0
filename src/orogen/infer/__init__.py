"""Running trained models: an engine with continuous batching, generation, a server; and scores of given tokens.

**The engine.** `engine.py` answers requests (`request.py`). In each round the host decides what is done
(`schedule.py`, with `pages.py` and `prefix.py` for memory), the devices do it (`programs.py` compiles what `forward.py`
describes, and a thread in `lane.py` dispatches it), and the host tells what came of it. The forward pass is the
training model's, with the caches of `model/slots.py` as what its layers are given: pages of keys and values, rings for
windows, convolution windows and states that do not grow. Many steps of decoding run in one program; prompts are read in
pieces between them. Keys and values may be kept in FP8 (`precision/key_values.py`), states in float16 or in blocks of
int8 (`model/stored_state.py`): `EngineConfig.key_values`, `.state_dtype` and `.state_rounding`.

**What is promised.** A request's tokens depend on nothing beside it: what is no token of a row is masked, experts take
all tokens, and a request draws with a key of its own (`sampling.py`). With `EngineConfig.exact`, answers and their
log-probabilities are equal to the bit, whatever pieces a text comes in (`exact.py`). A draft is kept only where it is
the token that would have been chosen without it, so that speculation changes no answer, drawn ones included.

**Why admission reserves all pages** that a request may need: a hybrid's states are large, and to preempt a request
means to copy them out or to read its text again. See `schedule.py`.

**Plans.** Slots lie over `data`, heads over `tensor`, experts over `expert`. Over `context`, for long prompts, each
rank reads its part of a piece and has a copy of the pages of its data rank (`model/context_cache.py`). So a prompt may
come in any pieces and begin in the prefix cache; pages that lie on one rank would have to move for that. Decoding
splits the slots over the same ranks, so only memory is spent twice; but a page of an answer is right on one rank alone,
and answers do not enter the prefix cache. There are no stages: a checkpoint of any plan opens without them.

**Serving.** `service.py` gives the engine a thread of its own and hands streams to an event loop; `serve/` answers over
HTTP. `chat.py` turns messages into ids: templates are rendered by a process of their own (`template_worker.py`), and no
text of a client becomes a special token. `answer.py` and `tool_calls.py` take answers apart. Our templates are in
`templates/`; `orogen serve --chat_template` names one, or a file.

**Scores.** `Request.prompt_logprobs` asks for the log-probabilities of a prompt's own tokens, also through the server
(`echo` beside `logprobs`); `prompt_scores.py` computes them behind each piece. `orogen score` takes `--segments`, which
names the documents of each row (runs of equal ids) and padding (0).
"""
