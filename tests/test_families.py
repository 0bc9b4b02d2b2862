"""The family file says what the models' own modules compute."""

from __future__ import annotations

import importlib.util
import json
import zlib
from importlib.metadata import version

import pytest

from normkit.checkpoint._families import _DATA, Rule, endings, families, find, pattern_of

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="no models to build"
)
CONTENT = json.loads(_DATA.read_text())
# One of a kind each: an offset, hard-coded eps, groups and a gate, a switch of kinds, LayerNorms
# without a bias, sections, a tower, an rms norm that is called LayerNorm.
SAMPLE = [
    "gemma3_text",
    "kimi_linear",
    "mamba2",
    "mobilebert",
    "mpt",
    "qwen2_vl",
    "siglip",
    "t5",
]


def test_it_is_small_and_names_what_it_was_made_from():
    assert len(zlib.compress(_DATA.read_bytes(), 6)) < 150_000  # as in a wheel
    assert set(CONTENT["made_from"]) == {"diffusers", "transformers"}
    assert len(CONTENT["families"]) > 600


def test_every_rule_is_read_as_it_is_written():
    texts = {text for family in CONTENT["families"].values() for text in family["rules"]}
    assert all(str(Rule.parsed(text)) == text for text in texts)


def test_every_entry_of_a_config_that_a_rule_names_has_a_default():
    for name, family in families().items():
        for rule in set(family.rules.values()):
            for entry in (rule.eps, rule.groups):
                if isinstance(entry, str):
                    default, _ = family.entries[entry]
                    assert default is not None, (name, entry)


@pytest.mark.parametrize("name", ["a.0.norm", "layers.12.3.ln_1", "norm"])
def test_numbers_are_stars_and_endings_begin_at_dots(name):
    pattern = pattern_of(name)
    assert not any(part.isdecimal() for part in pattern.split("."))
    found = list(endings(pattern))
    assert found[0] == pattern
    assert found[-1] == ""
    assert len(found) == name.count(".") + 2


def test_the_longest_ending_decides():
    family = families()["mllama"]
    for part, eps in (("vision_model.transformer", "norm_eps"), ("language_model", "rms_norm_eps")):
        rule = family.rule(f"{part}.layers.*.input_layernorm", {})
        assert isinstance(rule.eps, str)
        assert rule.eps.endswith(f".{eps}")


def test_another_model_in_the_place_of_the_usual_one_goes_by_its_own_family():
    config = {"model_type": "llava", "text_config": {"model_type": "gemma", "rms_norm_eps": 0.5}}
    found = find(config, "language_model.model.layers.*.input_layernorm")
    assert found is not None
    assert found.name == "gemma"
    assert found.value(found.rule.eps) == (0.5, "rms_norm_eps")


@needs_transformers
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_built_anew_says_the_same(name):
    """Of every class of the family, with an eps of its own for each entry, and of defaults."""
    from families.building import quiet, transformers_families
    from families.comparing import Comparison, compare
    from families.table import entry

    quiet()
    (family,) = [f for f in transformers_families() if f.name == name]
    result = Comparison()
    compare(family, result)
    assert result.counts["norms"] >= 4
    assert set(result.counts) == {"norms"}, result.examples
    if version("transformers") == CONTENT["made_from"]["transformers"]:
        assert entry(family)[0] == CONTENT["families"][name]
