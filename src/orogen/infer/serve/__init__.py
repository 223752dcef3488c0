"""The HTTP server: OpenAI's interface, with vLLM's names for what OpenAI's has none for.

`app.py` has the routes; `forms.py` reads bodies; `completions.py` and `chats.py` answer; `exchange.py` is what both
need to hand requests over and to stream; `run.py` starts and stops the whole.

Fields of a body that are unknown are ignored, so that clients made for other or later servers work; the answer's header
`x-ignored-fields` names them. Fields that are known, would change the answer and are not offered are refused.
"""
