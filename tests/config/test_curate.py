"""Configs of curation: refusals by message, and gin files that load to an equal config."""

import pytest

from orogen.config.checks import ConfigError
from orogen.config.curate import (
    C4Config,
    ClassifyConfig,
    CurateConfig,
    DecontaminateConfig,
    DedupConfig,
    ExtractConfig,
    GopherConfig,
    LanguageConfig,
)
from orogen.config.load import load_curation

SOURCES = (("web", "/web"),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CurateConfig(sources=()), "sources is (); expected at least one source"),
        (lambda: CurateConfig(sources=(("", "/a"),)), "expected at least one source, each with a name"),
        (lambda: CurateConfig(sources=(*SOURCES, *SOURCES)), "expected sources with different names"),
        (lambda: CurateConfig(sources=SOURCES, stages=(DedupConfig(), LanguageConfig())), "in the order ExtractConfig"),
        (lambda: CurateConfig(sources=SOURCES, stages=(DedupConfig(), DedupConfig())), "at most one of each"),
        (lambda: CurateConfig(sources=SOURCES, shard_bytes=0), "shard_bytes is 0; expected a number above 0"),
        (lambda: ExtractConfig(extractor="lynx"), "extractor is 'lynx'; expected one of resiliparse, trafilatura"),
        (lambda: LanguageConfig(min_probability=1.5), "min_probability is 1.5; expected a number from 0 to 1"),
        (lambda: GopherConfig(max_words=49), "max_words is 49; expected at least min_words = 50"),
        (lambda: GopherConfig(min_stop_words=9), "min_stop_words is 9; expected at most the 8 stop_words"),
        (lambda: C4Config(min_sentences=-1), "min_sentences is -1; expected 0 or more"),
        (lambda: ClassifyConfig(good=(), bad=("b",)), "good is (); expected at least one path"),
        (lambda: ClassifyConfig(good=("a",), bad=("b",), threshold=1.0), "threshold is 1.0; expected a number between"),
        (lambda: DedupConfig(rows=0), "rows is 0; expected a number from 1 to 1000"),
        (lambda: DedupConfig(jaccard=1.1), "jaccard is 1.1; expected a number from 0 to 1"),
        (lambda: DecontaminateConfig(evaluation=("a",), shortest=14), "shortest is 14; expected a number from 1 to"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_gin_file_names_its_stages_and_its_operative_text_loads_to_the_same(tmp_path):
    file = tmp_path / "a.gin"
    file.write_text(
        "CurateConfig.sources = [('web', '/web')]\n"
        "CurateConfig.stages = [@LanguageConfig(), @DedupConfig()]\nDedupConfig.bands = 7\n"
    )
    config, text = load_curation([file], ["LanguageConfig.languages = ['de']"])
    assert config == CurateConfig(
        sources=[("web", "/web")], stages=[LanguageConfig(languages=["de"]), DedupConfig(bands=7)]
    )
    (tmp_path / "b.gin").write_text(text)
    assert load_curation([tmp_path / "b.gin"])[0] == config
    for binding, message in (
        ("GopherConfig.min_words = 3", "bindings that nothing read: GopherConfig.min_words"),
        ("CurateConfig.stages = [@DedupConfig]", "stages is"),
        ("CurateConfig.stages = [3]", "stages is \\[3\\]; expected a value of type"),
        ("CurateConfig.stages = [@ClassifyConfig()]", "missing 2 required keyword-only arguments"),
        ("DedupConfig.band = 3", "doesn't have a parameter named 'band'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_curation([file], [binding])
    (tmp_path / "c.gin").write_text("DataConfig.corpus = 'stdlib'\n")
    with pytest.raises(ConfigError, match="no bindings of CurateConfig|nothing read"):
        load_curation([tmp_path / "c.gin"])
