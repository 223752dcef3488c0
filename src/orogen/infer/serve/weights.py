"""`/v1/weights`: other weights for a server that runs, from a folder that it was started with permission for."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from orogen.checkpoint.open import Opened, open_folder, read_model
from orogen.config.checks import ConfigError, shown
from orogen.config.engine import EngineConfig
from orogen.config.json_file import Record, Whole
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.infer.engine import Engine
from orogen.infer.request import EngineFailed
from orogen.infer.serve.body import ignored, read_body
from orogen.infer.serve.errors import HttpError, bad, closed

FORM = Record({"folder": str}, {"version": (Whole(0, 2**31 - 1), None), "in_flight": (bool, None)})


@dataclasses.dataclass
class Weights:
    """Loads checkpoints of the served model, below the folder `root` alone. plan: the server's, None: of one device."""

    engine: Engine
    root: Path
    model: ModelConfig
    plan: PlanConfig | None
    config: EngineConfig
    _one_at_a_time: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    def read(self, name: str) -> Opened:
        """The checkpoint. Raises HttpError for one outside the root, which is not touched, and for another model's."""
        root = self.root.resolve()
        folder = (root / name).resolve()
        if root not in folder.parents:
            raise HttpError(403, f"folder is {shown(name)}; expected one inside the server's --weights")
        try:
            with open_folder(folder) as found:
                if found.config != self.model:
                    raise bad(f"folder is {shown(name)}, a checkpoint of another model; expected the served one's")
                return read_model(
                    found, self.plan, self.config.compute_dtype, tokenizer=False, weights=self.config.weights
                )
        except (ConfigError, OSError) as error:
            raise bad(f"folder is {shown(name)}: {error}") from None


async def load_weights(request: HttpRequest) -> Response:
    """The route. in_flight: requests that are there go on with the new weights, and with what older ones cached, which
    later requests do not see; otherwise none may be there. version: told with each token that the weights choose, as
    `token_versions`. The answer, and those of completions, tell the `instance`: the process that has the weights."""
    parts = request.app.state.parts
    body, unknown = await read_body(request, FORM)
    weights: Weights | None = parts.weights
    if weights is None:
        raise HttpError(403, "this server takes no weights; expected one that was started with --weights")
    async with weights._one_at_a_time:
        opened = await asyncio.to_thread(weights.read, body["folder"])
        give: Any = weights.engine.swap if body.get("in_flight", False) else weights.engine.give
        version = body.get("version", 0)
        try:
            await parts.service.between(lambda: give(opened.params, opened.buffers, version=version))
        except EngineFailed as error:
            raise closed(str(error)) from None
        except ValueError as error:
            raise HttpError(409, f"{error}, or in_flight true") from None
    told = {"folder": body["folder"], "version": version, "instance": parts.instance}
    return JSONResponse(told, headers=ignored(unknown))
