"""Reading and running trained models.

`orogen score` takes `--segments`, which names the documents of each row (runs of equal ids) and padding (0).

Generation recomputes the whole sequence for every token; it does not use the caches of `model/cache.py` yet. Nothing is
dropped, whatever capacity a run was trained with.

**Serving.** `service.py` gives the engine a thread of its own and hands streams to an event loop; `serve/` answers over
HTTP. `chat.py` turns messages into ids: templates are rendered by a process of their own (`template_worker.py`), and no
text of a client becomes a special token. `answer.py` and `tool_calls.py` take answers apart. Our templates are in
`templates/`; `orogen serve --chat_template` names one, or a file.
"""
