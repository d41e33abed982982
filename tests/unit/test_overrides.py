"""A text key gets exactly the typed text, even where Hydra or YAML would convert it."""

import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ftexp.cli.overrides import as_typed, as_typed_yaml, quoted_word
from ftexp.config.schema import Config
from ftexp.evaluate.command import EvaluateConfig

TEXTS = [
    *("1.10", "3e563", "7e12345", "1_0", "nan", "True", "0x1F", "2026-11-26", "~/x", "/ä/ö", "/a (1)/b", "/it's/here"),
    *("[x]", "/a{b}", "a=b", "/a\\b", "/ends with\\", "\\'", '/a"b', "a:b", "007", "-1"),
]


def read(word):
    """Return the value of an override as Hydra passes it to OmegaConf."""
    value = OverridesParser.create().parse_override(word).value()
    return value if isinstance(value, str) else value.text


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_what_was_typed_in_either_kind_of_command(text):
    for key in ("run.name", "data.root", "++tracker.tags.commit"):
        assert read(as_typed(Config, f"{key}={text}")) == text
    config = OmegaConf.from_dotlist([as_typed_yaml(EvaluateConfig, f"run={text}")])
    assert config.run == text


@pytest.mark.parametrize(
    "word",
    [
        *("run.name=null", "run.name=first", "run.name='1.10'", 'run.name="a b"', "run.name=", "~run", "-m"),
        *("data.root=${oc.env:HOME}/x", "optim.lr=1e-3", "model=vit", "train.epochs=[3]", "run.name=a,b"),
        *("model.name=choice(vit,1)", "hydra.sweeper.max_batch_size=3", "tracker.tags={a: b}"),
    ],
)
def test_what_means_something_else_is_left_alone(word):
    assert as_typed(Config, word) == word


def test_a_sweep_over_texts_keeps_each_as_it_was_typed():
    assert as_typed(Config, "data.split=x,1.10") == "data.split=x,1.10"  # not a key of the schema
    assert as_typed(Config, "run.name=1.10,b,2e9") == "run.name='1.10',b,'2e9'"


@pytest.mark.parametrize("word", ["run=null", "run='1.10'", "batch_size=3", "data=3", "out"])
def test_of_a_command_that_reads_yaml_the_rest_is_left_alone(word):
    assert as_typed_yaml(EvaluateConfig, word) == word


@pytest.mark.parametrize("text", [*TEXTS, "$HOME", "`id`"])
def test_what_an_error_advises_comes_through_a_shell_as_the_text(text):
    advice = quoted_word(f"model.kwargs.x={text}")
    word = subprocess.run(["sh", "-c", f"printf %s {advice}"], capture_output=True, text=True, check=True).stdout
    assert read(word) == text
