"""What an engine's config comes to on a model and its plan, and which of them go together."""

from typing import NamedTuple

from orogen.config.checks import require
from orogen.config.engine import EngineConfig
from orogen.config.kinds import reading
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.cost.kind import request_cache
from orogen.infer.capacity import Capacity


class Sizes(NamedTuple):
    """Sizes of an engine's memory, all but `ranks` per data rank.

    ranks: data ranks. slots: requests that run at a time. length: most tokens of a text. drafts: tokens that are
    drafted at a time, 0 if nothing drafts. reach: pages of a text, the width of a page table. pages: 0 for a model
    without attention over all tokens. recurrent: whether a slot has more than pages. snapshots: states that the prefix
    cache holds.
    """

    ranks: int
    slots: int
    length: int
    drafts: int
    reach: int
    pages: int
    recurrent: bool
    snapshots: int

    def capacity(self, config: EngineConfig) -> Capacity:
        """What the scheduler must know of them."""
        return Capacity(
            slots=config.slots, ranks=self.ranks, page=config.page, pages=self.pages, recurrent=self.recurrent,
            reach=self.reach if self.pages else None, snapshots=self.snapshots, chunk=config.chunk,
            prefill_tokens=config.prefill_tokens, queue=config.queue, drafts=self.drafts,
            lookahead=int(config.drafter == "mtp"), reuse=config.prefix_cache, whole=config.exact,
        )  # fmt: skip


def sizes_of(model: ModelConfig, plan: PlanConfig, config: EngineConfig) -> Sizes:
    """The sizes of an engine's memory. Raises ConfigError for a plan or model that it cannot serve."""
    _check(model, plan, config)
    letters = model.layers.main + (model.layers.mtp if config.drafter == "mtp" else "")
    drafts = 0 if config.drafter == "none" else config.drafts
    slots = config.slots // plan.data
    # Drafts beyond the last token have positions too.
    length = min(config.max_length, (model.learned_positions or config.max_length + drafts) - drafts)
    reach = -(-(length + drafts) // config.page)
    kept = [request_cache(letter, model) for letter in letters]
    paged = any(cache.token and cache.window is None for cache in kept)
    recurrent = any(cache.window is not None or cache.channels or cache.taps for cache in kept)
    pages = (config.pages or slots * reach) if paged else 0
    return Sizes(
        ranks=plan.data, slots=slots, length=length, drafts=drafts, reach=min(reach, pages) if paged else 1,
        pages=pages, recurrent=recurrent, snapshots=config.snapshots if recurrent and config.prefix_cache else 0,
    )  # fmt: skip


def _check(model: ModelConfig, plan: PlanConfig, config: EngineConfig) -> None:
    # A pipeline would need as many groups of slots in flight as it has stages, each with programs of its own. Layers of
    # any layout open on a plan without stages, where `tensor` and `expert` divide the same weights.
    anywhere = "1: an engine has no pipeline, and opens checkpoints of any plan without one"
    require(plan.stage == 1, plan, "stage", anywhere)
    if plan.context > 1:  # see `model.context_cache`
        letters = {*model.layers.main, *model.layers.mtp}
        gathers = plan.context_attention == "allgather" or not letters & set(reading("context_attention"))
        require(gathers, plan, "context_attention", "allgather in an engine: each rank has all pages")
        passes = plan.context_ssm == "state" or not letters & set(reading("context_ssm"))
        require(passes, plan, "context_ssm", "state in an engine: each rank has all heads")
    require(plan.capacity_factor is None, plan, "capacity_factor", "None: no token is dropped here")
    require(plan.buffer_factor is None, plan, "buffer_factor", "None: no token is dropped here")
    require(plan.linear == "plain", plan, "linear", "plain here")
    require(plan.attention != "cudnn", plan, "attention", "full or blocked: cuDNN's reads no pages")
    each = plan.data * plan.context * plan.tensor
    require(config.slots % each == 0, config, "slots", f"a multiple of data x context x tensor = {each}")
    require(plan.devices == 1 or not config.exact, config, "exact", f"False on {plan.devices} devices")
    told = plan.tensor == plan.context == 1 and "E" in model.layers.main
    expected = "False without experts, or with tensor or context, whose ranks route a part of the tokens each"
    require(told or not config.report_experts, config, "report_experts", expected)
    has_block = config.drafter != "mtp" or bool(model.layers.mtp)
    require(has_block, config, "drafter", "none or lookup: the model has no multi-token-prediction block")
