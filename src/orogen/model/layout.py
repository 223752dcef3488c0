"""How a model's layers are laid out over the devices of a plan: all on each, or split into the stages of a pipeline.

Letters: m microbatches, b batch, t time, l layers, e experts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from orogen.model.block import Repeat, letters, places, repeats
from orogen.model.by_letter import Items, plain
from orogen.model.stages import BACKBONE, LAYERS, MOE, MTP, Stages
from orogen.moe.layer import Choice, Replay
from orogen.parallel.axes import TOKENS
from orogen.parallel.plan import Plan


@dataclasses.dataclass(frozen=True)
class Whole:
    """Every device has every layer: those of the backbone's pattern and of the MTP block's. `Stages` has the same
    interface."""

    main: str
    mtp: str

    @property
    def chunks(self) -> list[tuple[str, str]]:
        """The patterns of backbone and MTP block for each chunk: here there is one."""
        return [(self.main, self.mtp)]

    @property
    def segmented(self) -> tuple[str, ...]:
        """The pattern's pipeline segments: none."""
        return ()

    @property
    def filled(self) -> dict[str, float]:
        """See `Stages.filled`: here, no array has rows without a layer."""
        return {}

    def split(self, state: nnx.State) -> nnx.State:
        """Parameters or buffers of a whole model in this layout."""
        return state

    def join(self, state: nnx.State) -> nnx.State:
        """The inverse of `split`."""
        return state

    def layer(self, state: nnx.State, number: int) -> nnx.State:
        """The parameters or buffers of one layer, counted along the pattern, with the MTP block's layers last."""
        if number < len(self.main):
            tree: Any = state.get(BACKBONE, {})
            place = places(repeats(self.main))[number]
        else:
            tree = state.get(MTP, {}).get(LAYERS, {})
            place = places(repeats(self.mtp))[number - len(self.main)]
        for child in place.path:
            tree = tree.get("children", {}).get(child, {})
        return nnx.State(jax.tree.map(lambda a: a[place.index], plain(tree)))

    def loads(self, load: Sequence[Array]) -> Array:
        """(l, e): the routers' counters, in the order of the pattern, with the MTP block's last; see `Sums`."""
        load_l, offset = [], 0
        for items in (repeats(self.main), repeats(self.mtp)):  # one set of routers for all depths of an MTP block
            experts = [p for p, letter in zip(places(items), letters(items), strict=True) if letter == MOE]
            paths = sorted({place.path for place in experts})
            load_l += [load[offset + paths.index(place.path)][place.index] for place in experts]
            offset += len(paths)
        return jnp.stack(load_l) if load_l else jnp.zeros((0, 0))

    def load_specs(self, plan: Plan) -> Any:
        """The PartitionSpec of these counters."""
        return plan.spec()

    def choice_specs(self, plan: Plan, depths: int) -> Any:
        """PartitionSpecs of the routers' choices (m, …, b, t, …), one tree per stack in the order in which they run."""
        return tuple(_choice_specs(items, plan, 1) for items in (repeats(self.main), *[repeats(self.mtp)] * depths))

    def split_replay(self, replay: tuple[Any, ...]) -> Any:
        """Replays (m, …, b, t, k) of the whole model's stacks, in this layout's form."""
        return replay


Layout = Whole | Stages


def relaid(state: Any, before: Layout, after: Layout) -> Any:
    """`state`, or a part of it, moved from the layout `before` to the layout `after`; optimizer state too."""

    def lay(tree: Any) -> Any:
        return after.split(before.join(tree)) if isinstance(tree, nnx.State) else tree

    return jax.tree.map(lay, state, is_leaf=lambda x: isinstance(x, nnx.State))


def _choice_specs(items: Items, plan: Plan, stacked: int) -> Any:
    """PartitionSpecs of a stack's choices, whose arrays have `stacked` axes before batch and time."""
    specs = []
    for item in items:
        if isinstance(item, Repeat):
            specs.append(_choice_specs(item.items, plan, stacked + 1))
        else:
            axes = (None,) * stacked + TOKENS
            each: Any = plan.spec(*axes, None)
            token: Any = plan.spec(*axes)
            specs.append(Choice(Replay(each, each), token, token) if item == MOE else None)
    return tuple(specs)
