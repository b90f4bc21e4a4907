import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hcodec_core.codecs import SHIPPED, load_manifest
from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.models.hcodec.config import tiny
from hcodec_core.models.hcodec.model import HCodec
from hcodec_core.models.loading import CodecCard, load_codec, part_digests, save_codec
from hcodec_core.tokens import EncodeSettings

SETTINGS = EncodeSettings(compute_class="cpu-test")
CARD = CodecCard(name="mine", is_trained=False, weights_licence="none")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_codec(HCodec(tiny()), CARD, tmp_path / "codec")
    return tmp_path / "codec"


def rewrite(folder, change):
    """Change the tensors and make the manifest's digest of the file fit again."""
    import hashlib

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    manifest = json.loads((folder / "codec.json").read_text())
    data = (folder / "model.safetensors").read_bytes()
    manifest["weights_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "codec.json").write_text(json.dumps(manifest))


def test_what_was_saved_is_loaded(folder):
    codec = load_codec(str(folder), SETTINGS)
    torch.manual_seed(0)
    original = HCodec(tiny()).state_dict()
    loaded = codec.state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[key], original[key]) for key in original)
    assert not codec.training
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    assert codec.spec.manifest == load_manifest(f"file://{folder}")
    tokens = codec.encode(torch.zeros(1, 1, 700), torch.tensor([700]))
    assert torch.isfinite(codec.decode(tokens)).all()


def test_shipped_presets_load_and_are_marked_untrained():
    for name, path in SHIPPED.items():
        manifest = load_manifest(name)
        assert manifest.name == name
        size = sum(file.stat().st_size for file in path.iterdir())
        assert size < 8_000_000
    nano = load_codec("hcodec-nano", SETTINGS, expected_digest=load_manifest("hcodec-nano").digest)
    assert not nano.spec.manifest.is_trained
    assert nano.spec.manifest.num_parameters <= 2_500_000


def test_object_storage_goes_through_fetch(folder):
    def fetch(uri):
        assert uri.startswith("s3://bucket/codecs/mine/")
        return (folder / uri.rpartition("/")[2]).read_bytes()

    codec = load_codec("s3://bucket/codecs/mine/", SETTINGS, fetch=fetch)
    assert codec.spec.manifest == load_manifest(str(folder))
    with pytest.raises(ConfigError, match="not configured"):
        load_codec("s3://bucket/codecs/mine", SETTINGS)


def test_another_digest_is_refused(folder):
    with pytest.raises(CheckpointError, match="expected 0000"):
        load_codec(str(folder), SETTINGS, expected_digest="0" * 32)


def test_a_changed_file_is_refused(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        load_codec(str(folder), SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("decoder.norm.bias"), r"lacks the tensor 'decoder\.norm\.bias'"),
        (lambda state: state.update(extra=torch.zeros(1)), "'extra', for which there is no place"),
        (
            lambda state: state.update({"decoder.norm.bias": torch.zeros(3)}),
            r"'decoder\.norm\.bias' .* is torch\.float32 \(3,\); expected torch\.float32 \(32,\)",
        ),
        (
            lambda state: state.update({"decoder.norm.bias": torch.zeros(32).half()}),
            r"'decoder\.norm\.bias' .* is torch\.float16",
        ),
        (
            lambda state: state["decoder.norm.bias"].fill_(float("nan")),
            r"'decoder\.norm\.bias' .* not finite",
        ),
        (lambda state: state["decoder.norm.bias"].add_(1), "parts in codec.json"),
        (lambda state: state["quantizers.semantic.codebooks"].add_(1), "parts in codec.json"),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_codec(str(folder), SETTINGS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hop_length", 320), ("sample_rate", 8000), ("is_variable_rate", True), ("num_parameters", 1)],
)
def test_an_edited_manifest_is_refused(folder, field, value):
    manifest = json.loads((folder / "codec.json").read_text())
    (folder / "codec.json").write_text(json.dumps(manifest | {field: value}))
    with pytest.raises(CheckpointError, match=field):
        load_codec(str(folder), SETTINGS)


def test_an_edited_architecture_is_refused(folder):
    manifest = json.loads((folder / "codec.json").read_text())
    manifest["architecture"]["encoder_heads"] = 4
    (folder / "codec.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="parts"):
        load_codec(str(folder), SETTINGS)
    manifest["architecture"]["strides"] = [2, 2]
    (folder / "codec.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="frame rates"):
        load_codec(str(folder), SETTINGS)


def test_missing_and_broken_files(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no readable codec\.json"):
        load_codec(str(tmp_path / "nothing"), SETTINGS)
    shutil.copytree(folder, tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no readable model\.safetensors"):
        load_codec(str(tmp_path / "half"), SETTINGS)
    (folder / "codec.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_codec(str(folder), SETTINGS)


def test_a_file_that_is_no_safetensors(folder):
    import hashlib

    (folder / "model.safetensors").write_bytes(b"not tensors")
    manifest = json.loads((folder / "codec.json").read_text())
    manifest["weights_sha256"] = hashlib.sha256(b"not tensors").hexdigest()
    (folder / "codec.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="no safetensors"):
        load_codec(str(folder), SETTINGS)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    codec = HCodec(tiny())
    codec.decoder.norm.bias.data[3] = float("inf")
    with pytest.raises(CheckpointError, match=r"decoder\.norm\.bias"):
        save_codec(codec, CARD, tmp_path / "codec")
    assert not (tmp_path / "codec").exists()


def test_each_part_has_its_own_digest():
    codec = HCodec(tiny())
    before = part_digests(codec)
    changes = {
        "encoder": codec.acoustic_encoder.conv_in.conv.bias,
        "ssl": codec.ssl.feature_projection.projection.bias,
        "codebooks": codec.quantizers["acoustic"].codebooks,
        "decoder": codec.decoder.norm.bias,
    }
    for part, tensor in changes.items():
        tensor.data += 1
        after = part_digests(codec)
        changed = {name for name in changes if getattr(before, name) != getattr(after, name)}
        assert changed == {part}
        before = after
    codec.semantic_decoder.conv_in.conv.weight.data += 1
    assert part_digests(codec) == before


def test_configuration_that_decides_codes_is_in_the_digest():
    torch.manual_seed(0)
    two = part_digests(HCodec(tiny()))
    torch.manual_seed(0)
    four = part_digests(HCodec(tiny().model_copy(update={"encoder_heads": 4})))
    assert two.encoder != four.encoder
    assert (two.ssl, two.codebooks, two.decoder) == (four.ssl, four.codebooks, four.decoder)


def test_a_codec_without_an_ssl_model_has_no_ssl_digest():
    assert load_manifest("hcodec-nano").parts.ssl == ""
