"""Reinforcement learning: environments, rollouts, objective and curriculum."""

import dataclasses
import urllib.parse
from typing import Annotated, NamedTuple

from orogen.config.checks import (
    ConfigError,
    check_types,
    require,
    require_choice,
    require_not_negative,
    require_positive,
)


class Defaults(NamedTuple):
    """What an algorithm sets where RLConfig leaves a field at None."""

    clip_low: float
    clip_high: float
    mean: str
    overlong: str
    resample: int


ALGORITHMS = {
    # The settings of Nemotron 3 Nano's RLVR.
    "grpo": Defaults(0.2, 0.28, "token", "filter", 0),
    # arXiv:2503.14476: clip-higher, token-level mean, soft overlong punishment, dynamic sampling.
    "dapo": Defaults(0.2, 0.28, "token", "penalty", 3),
    # arXiv:2507.18071, section 5.1.
    "gspo": Defaults(3e-4, 4e-4, "sequence", "filter", 0),
}
GYM = "nemo_gym"
KINDS = ("synthetic", "reasoning_gym", "code", "json_schema", "instructions", "workplace", GYM)
# Kinds whose tasks come from a family, and those whose tasks may come from a file.
OF_FAMILIES, OF_FILES = ("synthetic", "reasoning_gym"), ("code", "json_schema", "instructions", GYM)
RUN_CODE = ("code", "reasoning_gym")  # what the model writes may run as Python
IMPORTANCE = ("none", "tis", "icepop", "sequence")
OVERLONG = ("keep", "filter", "penalty")
PLAIN = "plain"
YEAR = 365 * 86400  # seconds


def is_address(url: str | None) -> bool:
    """Whether a text is http:// or https:// and a host, with perhaps a port and a path."""
    text = url or ""
    if not (text.isascii() and text.isprintable()) or " " in text:  # of which urlsplit drops some
        return False
    try:
        found = urllib.parse.urlsplit(text)
        whole = found.scheme in ("http", "https") and bool(found.hostname) and found.port != 0
        (found.hostname or "").encode("idna")  # as a connection does: no empty part, none of more than 63 characters
    except ValueError:
        return False
    return whole and found.username is None and not (found.query or found.fragment)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """Tasks with verifiable answers.

    kind: synthetic (small families of our own), reasoning_gym (needs the extra rl), code (unit tests in a sandbox),
    json_schema, instructions (checks in the manner of IFEval), workplace (tools over a small stateful database) or
    nemo_gym (the tools and the verifier of a resources server of NeMo Gym).
    corpus: one task per line of a .jsonl file; see the kind's module in posttrain/environments.
    """

    name: Annotated[str, "by which metrics know it: letters, digits, _ and -"]
    kind: Annotated[str, "synthetic, reasoning_gym, code, json_schema, instructions, workplace or nemo_gym"]
    share: Annotated[float, "share of each step's prompts, relative to those of the others"] = 1.0
    family: Annotated[str | None, "family of synthetic tasks, or data set of reasoning_gym"] = None
    corpus: Annotated[
        str | None, "file of tasks (.jsonl) of code, json_schema, instructions or nemo_gym; None: generated ones"
    ] = None
    url: Annotated[str | None, "where a resources server of NeMo Gym listens, such as http://127.0.0.1:8001"] = None
    examples: Annotated[int, "different tasks, where they are generated"] = 1000
    level: Annotated[int, "difficulty of generated tasks, where they have one"] = 1
    seed: Annotated[int, "of generated tasks"] = 0
    partial_credit: Annotated[float, "reward of a wrong answer in the right form, in synthetic tasks"] = 0.0
    turns: Annotated[int, "the most turns of the assistant in one episode"] = 8
    seconds: Annotated[float, "deadline of one verification"] = 10.0
    memory_mb: Annotated[int, "memory of the process that verifies, and of a program in the sandbox"] = 1024
    teacher: Annotated[
        str | None, "checkpoint of this domain's teacher, whose judgement of each token takes the place of rewards"
    ] = None
    unsandboxed: Annotated[
        bool, "whether code, or a family of reasoning_gym that evaluates answers, may run without a sandbox"
    ] = False

    def __post_init__(self) -> None:
        check_types(self)
        known = self.name.isascii() and self.name.replace("-", "_").replace("_", "a").isalnum()
        require(known, self, "name", "letters, digits, _ and -")
        require_choice(self, "kind", KINDS)
        require_positive(self, "share", "examples", "level", "turns", "seconds", "memory_mb")
        require(0 <= self.seed < 2**31, self, "seed", "an integer from 0 to 2**31 - 1")
        needs = self.kind in OF_FAMILIES
        require((self.family is not None) == needs, self, "family", f"a name with kind {self.kind!r}" if needs
                else f"None: kind {self.kind!r} has no families")  # fmt: skip
        expected = f"None: kind {self.kind!r} reads no file"
        require(self.corpus is None or self.kind in OF_FILES, self, "corpus", expected)
        leveled = self.level == EnvironmentConfig.level or (self.corpus is None and self.kind != "reasoning_gym")
        require(leveled, self, "level", "1: only generated tasks of our own have levels")
        expected = f"{EnvironmentConfig.examples}: the tasks are those of EnvironmentConfig.corpus"
        require(self.corpus is None or self.examples == EnvironmentConfig.examples, self, "examples", expected)
        for field in ("corpus", "teacher"):
            require(getattr(self, field) != "", self, field, "a non-empty string, or None")
        served = self.kind == GYM
        require(not served or self.corpus is not None, self, "corpus", "a data set of NeMo Gym")
        expected = "http:// or https:// and a host" if served else f"None: kind {self.kind!r} calls no server"
        require(is_address(self.url) if served else self.url is None, self, "url", expected)
        require(0 <= self.partial_credit < 1, self, "partial_credit", "from 0 to below 1")
        expected = "0: only synthetic tasks have it"
        require(not self.partial_credit or self.kind == "synthetic", self, "partial_credit", expected)
        expected = f"False: kind {self.kind!r} runs no code"
        require(not self.unsandboxed or self.kind in RUN_CODE, self, "unsandboxed", expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Group-relative policy optimisation on environments, with rollouts by Orogen's own engine: in the same process
    unless `server` is set.

    algorithm: grpo (arXiv:2402.03300, with Nemotron 3 Nano's settings), dapo (arXiv:2503.14476) or gspo
    (arXiv:2507.18071). It decides clip_low, clip_high, mean, overlong and resample where these are None.
    importance: the weight w = π_trainer / π_rollout of each token. tis clamps it to [importance_low, importance_high],
    icepop (token-level masked importance sampling) makes it 0 outside, sequence makes all of a sequence 0 whose
    geometric mean is outside.
    sequence_error: a sequence is left out if the mean over its tokens of exp|log π_trainer - log π_rollout| is larger.
    baseline: the mean of the group, or of its other samples. overlong: samples that reached max_tokens are kept, left
    out of the loss though not of the baseline (filter), or punished by up to `overlong_penalty` within the last
    `overlong_buffer` tokens (penalty).
    kl: times an estimate of KL(policy || first checkpoint): k2 = d²/2 or k3 = e^d - d - 1 of d = log π_ref - log π.
    length_control: λ of the zero-mean bonus for short thoughts and answers within a group, and concise_bonus of the
    shortest ones that are good (Nemotron 3 Nano report, section 3.4).
    curriculum: gaussian profiles the pass rate of every task, drops those that always succeed, and draws by a Gaussian
    over the pass rate whose mean goes from curriculum_start to curriculum_end over the run (section 3.2).
    EnvironmentConfig.teacher: distillation on policy (MOPD of Nemotron 3 Ultra). The advantage of each token of such an
    environment is log π_teacher - log π, within advantage_clip; rewards are only measured.
    updates: optimizer steps per batch of rollouts; with more than one, later ones are off-policy.
    exact: rollouts and the trainer's log-probabilities are computed by programs that round alike: they differ by 0.
    router_replay: the engine records the experts of every token, and the trainer's passes take those in place of their
    own choice; weights of experts are the trainer's (R3 of NeMo RL). Prompts are then read for each answer anew.
    server: a server writes the rollouts. Weights go to it as checkpoint folders, prompts as token ids; its key is in
    the environment, as OROGEN_API_KEY. A request that it refuses for now, drops or answers late is sent again, with
    growing waits that are no shorter than it asks for; the records count that as server_retries. A server that refuses
    connections, or answers 429 or 503, is busy or starts: server_deadline alone bounds how long that is waited for.
    staleness: with n > 0, rollouts are written by a thread beside the trainer, at most n batches ahead of it. The
    weights that train a batch are handed over between two calls of decoding, and texts go on with what older ones
    cached, so that tokens of one answer may be of different weights, and have the log-probabilities of these.
    template: plain joins the texts of messages by line ends, for models without one.
    """

    environments: Annotated[tuple[EnvironmentConfig, ...], "the environments"]
    prompts: Annotated[int, "tasks per batch of rollouts"]
    samples: Annotated[int, "answers per task: a group"]
    max_tokens: Annotated[int, "the most tokens of one answer"]
    template: Annotated[str, "chat template: plain, a file, the name of one of ours, or checkpoint for the model's"]
    temperature: Annotated[float, "of rollouts; the loss takes the model's own distribution, of temperature 1"] = 1.0
    algorithm: Annotated[str, "grpo, dapo or gspo"] = "grpo"
    clip_low: Annotated[float | None, "how far below 1 the ratio counts; None: the algorithm's"] = None
    clip_high: Annotated[float | None, "how far above 1 the ratio counts; None: the algorithm's"] = None
    dual_clip: Annotated[float | None, "bound, above 1, of the ratio times a negative advantage; None: none"] = None
    mean: Annotated[
        str | None, "what the loss is a mean over: each token, or each sequence with its mean; None: the algorithm's"
    ] = None
    importance: Annotated[str, "correction for rollouts that differ: none, tis, icepop or sequence"] = "icepop"
    importance_low: Annotated[
        float | None, "least weight of a token, or of a sequence's geometric mean; None: 0 with tis, else 0.5"
    ] = None
    importance_high: Annotated[float, "largest one"] = 2.0
    sequence_error: Annotated[float | None, "mismatch above which a sequence is left out; None: none is"] = 2.0
    baseline: Annotated[str, "group or leave_one_out"] = "leave_one_out"
    normalise: Annotated[bool, "whether advantages are divided by the standard deviation of the rewards"] = True
    advantage_clip: Annotated[float | None, "bound of advantages; None: none"] = None
    overlong: Annotated[str | None, "keep, filter or penalty; None: the algorithm's"] = None
    overlong_buffer: Annotated[int, "last tokens of max_tokens within which the penalty grows"] = 0
    overlong_penalty: Annotated[float, "of an answer of max_tokens"] = 1.0
    resample: Annotated[
        int | None, "rounds of further tasks for groups with equal rewards (DAPO); None: the algorithm's"
    ] = None
    kl: Annotated[float, "weight of the divergence from the first checkpoint; 0: none"] = 0.0
    kl_estimator: Annotated[str, "k2 or k3"] = "k3"
    length_control: Annotated[float, "weight of the bonus for short answers; 0: none"] = 0.0
    concise_bonus: Annotated[float, "bonus of the shortest thought and answer among good samples; 0: none"] = 0.0
    curriculum: Annotated[str, "none or gaussian"] = "none"
    profile_samples: Annotated[int, "answers per task from which its pass rate is estimated"] = 4
    profile_every: Annotated[int, "batches between profiles; 0: only one, at the start"] = 0
    curriculum_start: Annotated[float, "pass rate that is drawn most at the start"] = 0.8
    curriculum_end: Annotated[float, "pass rate that is drawn most at the end"] = 0.2
    curriculum_width: Annotated[float, "standard deviation of the Gaussian"] = 0.2
    updates: Annotated[int, "optimizer steps per batch of rollouts"] = 1
    exact: Annotated[bool, "whether rollouts and trainer agree to the bit; needs one device"] = False
    router_replay: Annotated[bool, "whether the trainer routes tokens to the experts that the rollout chose"] = False
    server: Annotated[str | None, "http://HOST:PORT of an `orogen serve` that writes the rollouts; None: here"] = None
    server_weights: Annotated[str | None, "the folder of its --weights, through which it gets the weights"] = None
    server_timeout: Annotated[float, "seconds after which a request without an answer is sent again"] = 600.0
    server_deadline: Annotated[
        float,
        "seconds within which a request is answered, however often it is sent, and while the server starts",
    ] = 1800.0
    server_retries: Annotated[
        int, "how many failures of a request are followed by another attempt; refused connections, 429 and 503 are none"
    ] = 8
    staleness: Annotated[int, "batches of rollouts that are written ahead while the trainer updates; 0: none"] = 0
    slots: Annotated[int, "answers that the engine writes at once"] = 16
    workers: Annotated[int, "processes that verify, per environment"] = 2
    table_rows: Annotated[int, "samples of each batch that are written to the run folder's rollouts/"] = 16

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "environments", tuple(self.environments))  # gin may give a list
        names = [one.name for one in self.environments]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"RLConfig.environments has the names {names}; expected at least one, each once")
        require_positive(self, "prompts", "max_tokens", "temperature", "importance_high", "advantage_clip", "updates")
        require_positive(self, "profile_samples", "curriculum_width", "slots", "workers", "clip_low", "clip_high")
        require_not_negative(self, "importance_low", "overlong_buffer", "overlong_penalty", "resample", "kl")
        require_not_negative(self, "staleness")
        for field in ("router_replay", "staleness", "server"):
            expected = "nothing where exact is on: an engine of this process computes both sides, by the same weights"
            require(not (self.exact and getattr(self, field)), self, field, expected)
        require_not_negative(self, "length_control", "concise_bonus", "profile_every", "table_rows")
        taught = all(one.teacher is not None for one in self.environments)
        require_positive(self, "samples")
        require(self.samples > 1 or taught, self, "samples", "at least 2, where there are rewards: their baseline")
        require(self.template != "", self, "template", "a non-empty string")
        for field, choices in (
            ("algorithm", ALGORITHMS), ("mean", (None, "token", "sequence")), ("importance", IMPORTANCE),
            ("baseline", ("group", "leave_one_out")), ("overlong", (None, *OVERLONG)),
            ("kl_estimator", ("k2", "k3")), ("curriculum", ("none", "gaussian")),
        ):  # fmt: skip
            expected = "one of " + ", ".join(map(str, choices))
            require(getattr(self, field) in choices, self, field, expected)
        self._check_bounds()
        self._check_server()

    def _check_server(self) -> None:
        expected = "a folder with server, None without"
        require((self.server is None) == (self.server_weights is None), self, "server_weights", expected)
        whole = self.server is None or is_address(self.server) and self.server.lower().startswith("http:")
        require(whole, self, "server", "http://HOST:PORT of an `orogen serve`")
        require_positive(self, "server_timeout", "server_deadline")
        require_not_negative(self, "server_retries")
        expected = f"at least server_timeout = {self.server_timeout:g}"
        require(self.server_timeout <= self.server_deadline, self, "server_deadline", expected)
        require(self.server_deadline <= YEAR, self, "server_deadline", f"at most {YEAR}, a year: longer waits overflow")

    def _check_bounds(self) -> None:
        require(self.clip_low is None or self.clip_low < 1, self, "clip_low", "below 1")
        require(self.dual_clip is None or self.dual_clip > 1, self, "dual_clip", "above 1")
        expected = f"below importance_high = {self.importance_high}"
        require(self.least_importance < self.importance_high, self, "importance_low", expected)
        require(self.sequence_error is None or self.sequence_error >= 1, self, "sequence_error", "1 or more, or None")
        require(self.prompts % self.updates == 0, self, "updates", f"a divisor of prompts = {self.prompts}")
        require(self.prompts >= len(self.environments), self, "prompts", "at least one per environment")
        fits = self.overlong_buffer <= self.max_tokens
        require(fits, self, "overlong_buffer", f"at most max_tokens = {self.max_tokens}")
        punished = self.chosen("overlong") == "penalty"
        expected = "above 0 where overlong is penalty, else 0"
        require(punished == (self.overlong_buffer > 0), self, "overlong_buffer", expected)
        for field in ("curriculum_start", "curriculum_end"):
            require(0 <= getattr(self, field) <= 1, self, field, "from 0 to 1")

    def chosen(self, field: str) -> float | int | str:
        """The field, or what the algorithm sets where it is None."""
        value = getattr(self, field)
        return getattr(ALGORITHMS[self.algorithm], field) if value is None else value

    @property
    def least_importance(self) -> float:
        """importance_low, or where it is None what NeMo RL takes for tis, and IcePop's bound for the others."""
        if self.importance_low is not None:
            return self.importance_low
        return 0.0 if self.importance == "tis" else 0.5
