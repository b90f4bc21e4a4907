import json

import pytest
import torch

from hcodec_core.errors import ConfigError
from hcodec_core.models.base import Part
from hcodec_core.models.loading import part_digests
from hcodec_core.models.registry import (
    FAMILIES,
    build_codec,
    conversion,
    facts,
    family_of,
    presets,
)


def test_every_hcodec_preset_builds_and_knows_its_parts():
    for make in presets("hcodec").values():
        config = make()
        with torch.device("meta"):
            codec = build_codec("hcodec", config.architecture())
        assert codec.hop_length == config.hop_length
        assert {codec.part_of(key) for key in codec.state_dict()} >= {
            Part.ENCODER,
            Part.CODEBOOKS,
            Part.DECODER,
        }
        assert not [
            name for name, buffer in codec.named_buffers() if name not in codec.state_dict()
        ]


def test_unknown_families_and_fields_are_refused():
    with pytest.raises(ConfigError, match="no codec family 'nothing'"):
        presets("nothing")
    architecture = presets("hcodec")["hcodec-tiny"]().architecture()
    with pytest.raises(ConfigError, match="latent_dim cannot be used"):
        build_codec("hcodec", architecture | {"latent_dim": "many"})
    with pytest.raises(ConfigError, match="exactly one of ssl and mel"):
        build_codec("hcodec", presets("hcodec")["hcodec-nano"]().architecture() | {"mel": None})


def test_hcodec_recognises_its_golden_folders():
    assert conversion("hcodec").recognises_golden({"version": "1.0"})
    assert not conversion("hcodec").recognises_golden({"model": {}})


def test_tiny_is_tiny():
    codec = build_codec("hcodec", presets("hcodec")["hcodec-tiny"]().architecture())
    assert sum(value.numel() for value in codec.state_dict().values()) < 200_000
    assert part_digests(codec).ssl


def test_preset_names_are_unique_and_every_one_has_facts():
    names = [name for family in FAMILIES for name in presets(family)]
    assert len(names) == len(set(names))
    for family in FAMILIES:
        assert facts(family).keys() == presets(family).keys()
        assert all(family_of(name) == family for name in presets(family))
    with pytest.raises(ConfigError, match="hcodec-nano"):
        family_of("nothing")


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_are_those_of_the_models(family):
    known = {}
    for name, make in presets(family).items():
        architecture = make().architecture()
        text = json.dumps(architecture, sort_keys=True)
        if text not in known:
            with torch.device("meta"):
                codec = build_codec(family, architecture)
            size = sum(value.numel() for value in codec.state_dict().values())
            known[text] = (size, codec.batching)
        stated = facts(family)[name]
        assert (stated.num_parameters, stated.batching) == known[text], name
        assert stated.support
        assert stated.weights
        assert stated.weights_licence
