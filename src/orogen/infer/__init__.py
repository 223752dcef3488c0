"""Reading and running trained models.

`orogen score` takes `--segments`, which names the documents of each row (runs of equal ids) and padding (0).

Generation recomputes the whole sequence for every token; it does not use the caches of `model/cache.py` yet. Nothing is
dropped, whatever capacity a run was trained with.
"""
