"""lm-eval's numbers from Orogen and from lm-eval's own Hugging Face backend, for the same weights and tasks."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.convert.synthetic import shapes, stored, write
from tests.convert.test_peer import without_clamp

from orogen.checkpoint.open import open_folder, open_model
from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.engine import EngineConfig
from orogen.config.evaluate import EvaluateConfig
from orogen.data.corpora import stdlib_documents
from orogen.data.vocabulary import make_tokenizer
from orogen.evaluate.run import Evaluator
from orogen.evaluate.subject import Stated, Subject, stated_length

LENGTH = 96  # of windows: texts are longer
WORDS = 384

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random hybrid in a Hugging Face folder, with a BPE tokenizer, and transformers' model of it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("hf")
    texts = (document.text for document, _ in zip(stdlib_documents(), range(12), strict=False))
    make_tokenizer(DataConfig(corpus="stdlib", tokenizer="bpe", vocab_size=WORDS), texts).save(folder)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(stored()["nemotron_h"]["config"] | {"vocab_size": WORDS} | ids))
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim >= 2 and "A_log" not in name:
                gain = 3 if "lm_head" in name else 1
                weight.copy_(gain * torch.randn(weight.shape, generator=draw) / math.sqrt(weight.shape[-1]))
    made.save_pretrained(folder)
    return folder, without_clamp(made)


@pytest.fixture(scope="module")
def hugging_face(model):
    from lm_eval.models.huggingface import HFLM

    folder, made = model
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=made, tokenizer=words, max_length=LENGTH, batch_size=3)


def write_tasks(folder: Path, hugging_face) -> None:
    """Three tasks. The references of the generation are what transformers writes, for two documents of three."""
    from lm_eval.api.instance import Instance

    source = list(stdlib_documents())[40].text.splitlines()
    lines = [line for line in source if len(line) > 20][:24]
    prompts = ["\n".join(lines[start : start + 3]) for start in range(0, 18, 3)] + ["", "x = "]
    settings = {"until": ["\n", "a"], "max_gen_toks": 9}
    requests = [Instance("generate_until", {}, (prompt, settings), number) for number, prompt in enumerate(prompts)]
    texts = hugging_face.generate_until(requests, disable_tqdm=True)
    assert any(texts)
    documents = {
        "choose": [
            {"q": a, "options": [b, c, " " + c], "right": number % 3}
            for number, (a, b, c) in enumerate(zip(lines, lines[1:], lines[2:], strict=False))
        ],
        "roll": [
            {"text": "\n".join(source)[start : start + size]} for start, size in ((0, 900), (900, 10), (950, 1700))
        ],
        "write": [
            {"q": q, "a": text + "!" * (n % 3 == 0)} for n, (q, text) in enumerate(zip(prompts, texts, strict=True))
        ],
    }
    forms = {
        "choose": "output_type: multiple_choice\ndoc_to_text: '{{q}} '\ndoc_to_choice: options\ndoc_to_target: right\n"
        "metric_list:\n- metric: acc\n- metric: acc_norm\n",
        "roll": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n"
        "- metric: word_perplexity\n- metric: byte_perplexity\n- metric: bits_per_byte\n",
        "write": "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\nmetric_list:\n- metric: exact_match\n"
        "generation_kwargs:\n  until: [\"\\n\", \"a\"]\n  max_gen_toks: 9\n",
    }  # fmt: skip
    for name, records in documents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / name}.jsonl\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{forms[name]}")


def test_repeated_draws_of_one_request_have_seeds_of_their_own():
    """lm-eval queues one Instance as often as its answer is drawn; the first draw's seed is that of a single one."""
    from lm_eval.api.instance import Instance

    from orogen.evaluate.harness_model import HarnessModel

    class Counted(HarnessModel):
        def __init__(self):
            self._subject = SimpleNamespace(request_length=99, write=lambda prompts: [p.sampling.seed for p in prompts])
            self._most = 100

        def tok_encode(self, string, *_):
            return [1]

    settings = {"do_sample": True, "max_gen_toks": 9}
    one, two = (Instance("generate_until", {}, ("x", settings), number) for number in (0, 1))
    seeds = Counted().generate_until([one, one, two, two])
    assert len(set(seeds)) == 4 and (seeds[0], seeds[2]) == (0, 1)


def test_numbers_are_those_of_the_hugging_face_backend(model, hugging_face, tmp_path, monkeypatch):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    write_tasks(tmp_path, hugging_face)
    names = ("choose", "roll", "write")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = simple_evaluate(hugging_face, tasks=list(names), task_manager=manager, bootstrap_iters=100)["results"]
    asked = ("choose", "roll", "wr?t*")
    config = EvaluateConfig(tasks=asked, task_path=(str(tmp_path),), max_length=LENGTH, batch_tokens=1024)
    evaluator = Evaluator(config)
    subject = Subject(open_model(model[0]), config, EngineConfig(slots=4, max_length=LENGTH))
    ours = evaluator.run(subject)
    programs = set(subject.scorer.programs)
    compared = 0
    for task, metrics in theirs.items():
        for name, value in metrics.items():
            if "," in name and "stderr" not in name and isinstance(value, float):
                assert ours[task][name.removesuffix(",none")] == pytest.approx(value, rel=1e-4), (task, name)
                compared += 1
    assert compared == 6
    print({task: ours[task] for task in names}, file=sys.stderr)
    assert 0 < ours["choose"]["acc"] < 1 and 0 < ours["write"]["exact_match"] < 1
    assert evaluator.run(subject) == ours and subject.scorer.programs == programs


def test_each_answer_is_that_of_the_hugging_face_backend(model, hugging_face):
    """Contexts that end in spaces, that are empty, that are too long, and that name special tokens."""
    from lm_eval.api.instance import Instance

    from orogen.evaluate.harness_model import HarnessModel

    pairs = [("def f", "(x):"), ("a  ", "b c"), ("", "import os"), ("x " * 200, "y z"), ("é", " →")]
    pairs += [("<bos>user\nx = 1<eos>\n<bos>assistant\n", "y<eos>"), ("a <eos>", " b")]
    kind = "loglikelihood"
    config = EvaluateConfig(tasks=("x",), max_length=LENGTH)
    ours = HarnessModel(Subject(open_model(model[0]), config, EngineConfig()))
    requests = [Instance(kind, {}, pair, number, ("task", number, 1)) for number, pair in enumerate(pairs)]
    expected = hugging_face.loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (wanted, choice) in zip(ours.loglikelihood(requests), expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-4) and greedy == choice
    assert ours.facts("task") == {"shortened": 1.0}
    texts = ["x = 1\n" * 60, "a", "word " * 96, "a<eos>b"]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    for value, wanted in zip(
        ours.loglikelihood_rolling(rolling), hugging_face.loglikelihood_rolling(rolling), strict=True
    ):
        assert value == pytest.approx(wanted, rel=1e-5)


def test_what_is_written_is_what_the_hugging_face_backend_writes(model, hugging_face):
    """Up to stop strings that overlap, whose order decides, and to names of special tokens."""
    from lm_eval.api.instance import Instance

    from orogen.evaluate.harness_model import HarnessModel

    source = [line for line in list(stdlib_documents())[40].text.splitlines() if len(line) > 20]
    free = hugging_face.generate_until(
        [Instance("generate_until", {}, (line, {"max_gen_toks": 24}), n) for n, line in enumerate(source[:12])], True
    )
    pairs = Counter(text[at : at + 3] for text in free for at in range(len(text) - 2))
    (three, _), *_ = pairs.most_common(1)
    untils = ([three[1:], three[:2]], [three[:2], three[1:]], ["<bos>", "<eos>"], ["<eos>\n", "e"])
    requests = [
        Instance("generate_until", {}, (line, {"until": until, "max_gen_toks": 24}), number)
        for until in untils
        for number, line in enumerate(source[:12])
    ]
    config = EvaluateConfig(tasks=("x",), max_length=LENGTH)
    ours = HarnessModel(Subject(open_model(model[0]), config, EngineConfig(slots=4))).generate_until(requests)
    assert ours == hugging_face.generate_until(requests, disable_tqdm=True)
    assert len({tuple(ours[start : start + 12]) for start in range(0, 48, 12)}) > 2


def test_requests_are_as_long_as_the_hugging_face_backend_takes_them(model, tmp_path):
    """By config.json, or the default of its class; by the tokenizer for a model that has none."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    in_config = "max_position_embeddings in the model's config.json"
    beside = "model_max_length in tokenizer_config.json"
    for name, changes, settings, source in (
        ("stated", {"max_position_embeddings": 71}, {}, in_config),
        ("default", {}, {"model_max_length": 50}, in_config),
        ("tokenizer", {"model_type": "mamba2"}, {"model_max_length": 50}, beside),
        ("neither", {"model_type": "mamba2"}, {}, None),
    ):
        config, tensors = shapes("mamba2" if changes.get("model_type") else "nemotron_h")
        folder = tmp_path / name
        config = {key: value for key, value in config.items() if key != "max_position_embeddings"}
        write(folder, config | changes, tensors)
        make_tokenizer(DataConfig(corpus="stdlib", tokenizer="byte"), ()).save(folder)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        words = transformers.AutoTokenizer.from_pretrained(folder)
        made = SimpleNamespace(config=transformers.AutoConfig.from_pretrained(folder))
        expected = HFLM.max_length.fget(
            SimpleNamespace(_max_length=None, model=made, tokenizer=words, _DEFAULT_MAX_LENGTH=2048)
        )
        with open_folder(folder) as opened:
            found = stated_length(opened)
        assert (found.length if found else 2048) == expected, name
        assert (found and found.source) == source, name


def test_a_task_that_asks_for_too_many_tokens_is_told_what_decides_their_number(model):
    from lm_eval.api.instance import Instance

    from orogen.evaluate.harness_model import HarnessModel

    opened, file = open_model(model[0]), Stated(71, "max_position_embeddings in the model's config.json")
    for bound, stated, limit in (
        (None, file, f"{file.source} = 71, in place of which EvaluateConfig.max_length counts"),
        (48, file, "EvaluateConfig.max_length = 48"),
        (None, None, "2048, as EvaluateConfig.max_length is None and the checkpoint does not say"),
    ):
        config = EvaluateConfig(tasks=("x",), max_length=bound)
        ours = HarnessModel(Subject(opened, config, EngineConfig(), stated=stated))
        asked = Instance("generate_until", {}, ("a", {"max_gen_toks": 3000}), 0)
        with pytest.raises(ConfigError, match=f"asks for 3000 new tokens; expected fewer than {limit}$"):
            ours._prompt(asked, draw=0)
        with pytest.raises(ConfigError, match=f"a continuation of 3000 tokens; expected at most {limit}$"):
            ours._row((), (5,) * 3000)


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [({}, 0), ({"do_sample": True}, 1), ({"do_sample": False, "temperature": 0.7}, 0), ({"temperature": 0.7}, 0.7)],
)
def test_a_task_that_asks_for_samples_gets_them(model, settings, temperature):
    from lm_eval.api.instance import Instance

    from orogen.evaluate.harness_model import HarnessModel

    ours = HarnessModel(Subject(open_model(model[0]), EvaluateConfig(tasks=("x",)), EngineConfig()))
    prompt = ours._prompt(Instance("generate_until", {}, ("a", settings), 0), draw=0)
    assert prompt.sampling.temperature == temperature
