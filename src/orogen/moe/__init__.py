"""Routed experts: router, dispatch, experts, and the layer that joins them.

**Capacity is per source rank**, so what is dropped depends on the plan. `PlanConfig.capacity_factor` bounds what an
expert takes from one rank, `drop_policy` says which assignments stay, and what is dropped is counted in the metrics.
`buffer_factor` bounds the buffers of the ragged dispatch; a step that does not fit is reported and changes nothing.
Evaluation and sampling drop nothing, whatever capacity a run trains with.

**The balance loss is per row of the batch**, as in Megatron, so it alone of all losses depends on how documents are
packed into rows. `ModelConfig.router_balance = 'global'` takes it over the global batch instead (Megatron's
`global_aux_loss`, but exact): the loss of a microbatch needs the choices of all, so with several of them a forward pass
counts these first, a third more work.

**The router multiplies in float32, by three bfloat16 parts of its gate** where the model computes in bfloat16: a GPU
takes float32 operands at 10 bits of fraction (TF32), after a copy of the input in float32.

**Add a dispatch.** A dispatch is a name of `PlanConfig.dispatch`. Write a class with `dispatch` and `combine` as the
docstring of `orogen.moe.dispatch` states them; its `Ticket` carries from the one to the other whatever it needs. Then
give the name a row in `DISPATCHES` there, in `DISPATCHES` of `config/plan.py` and in `DISPATCH_COLLECTIVES`
(`cost/collectives.py`), which counts what it sends; in `BUFFERED` there too, if its ticket counts overflow.
`tests/moe/test_dispatch.py` holds every dispatch against `orogen.moe.reference`, and adds one in this way; `orogen
verify` holds a plan with it against one device.
"""
