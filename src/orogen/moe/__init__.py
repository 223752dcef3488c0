"""Routed experts: router, dispatch, experts, and the layer that joins them.

**Capacity is per source rank**, so what is dropped depends on the plan. `PlanConfig.capacity_factor` bounds what an
expert takes from one rank, `drop_policy` decides which assignments are kept, and the metrics count the dropped ones.
`buffer_factor` bounds the buffers of the ragged dispatch; a step that does not fit is reported and skipped.
Evaluation and sampling drop nothing, whatever capacity a run trains with.

**The balance loss is per row of the batch**, as in Megatron, so it is the only loss that depends on how documents are
packed into rows. `ModelConfig.router_balance = 'global'` computes it over the global batch instead (Megatron's
`global_aux_loss`, but exact). The loss of a microbatch then needs the choices of all microbatches, so if there are
several, an extra forward pass counts these first: a third more work.

**The router multiplies in float32.** Where the model computes in bfloat16, the router's gate is split into three
bfloat16 parts: a GPU would round float32 operands to 10 bits of fraction (TF32), after copying the input to float32.

**Add a dispatch.** A dispatch is a value of `PlanConfig.dispatch`. Write a class with `dispatch` and `combine` as the
docstring of `orogen.moe.dispatch` specifies them; its `Ticket` carries whatever `combine` needs. It communicates by the
plan over the logical axes `expert`, `expert_tensor` and both together, `expert_ranks` (`plan.gather`, `scatter`,
`exchange`), and does nothing on a plan with one rank. Then add the class to `DISPATCHES` there, its name to
`DISPATCHES` in `config/plan.py`, and its costs to `DISPATCH_COSTS` (`cost/dispatches.py`): what it sends, the rows that
experts get, and whether its ticket counts overflow. Add the name to `DISPATCHES` in `tests/moe/meshes.py`, and
`tests/moe/test_dispatch.py` compares it with `orogen.moe.reference` on every mesh; that file also adds one in this way.
`orogen verify` compares a plan that uses it with one device.
"""
