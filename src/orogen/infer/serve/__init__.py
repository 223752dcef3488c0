"""The HTTP server: OpenAI's interface, with vLLM's names for what OpenAI's has none for.

`app.py` has the routes; `forms.py` and `structured.py` read bodies; `completions.py`, `chats.py` and `responses.py`
answer (of the last, `conversation.py` makes chats; chats with images go to `pictures.py`); `weights.py` loads other
weights of the model while the server runs, for a trainer whose rollouts it writes; `exchange.py` hands requests over
for all of them, after `grammars.py` compiled what they must match; `events.py` streams; `run.py` starts and stops the
whole.

Fields of a body that are unknown are ignored, so that clients made for other or later servers work; the answer's header
`x-ignored-fields` names them. Fields that are known, would change the answer and are not offered are refused.
"""
