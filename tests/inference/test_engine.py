"""The promise of mode exact: a clip's codes do not depend on its company, its place or a retry."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hcodec_core.errors import AudioError, ConfigError, ForeignTokensError, QuarantineReason
from hcodec_core.inference.agreement import measure_agreement
from hcodec_core.inference.arithmetic import narrow_type
from hcodec_core.inference.engine import Engine, compute_class
from hcodec_core.models.hcodec.config import tiny
from hcodec_core.models.loading import CodecCard, load_codec, save_codec
from hcodec_core.tokens import EncodeSettings, ShapeRule
from tests.models.hcodec.standardised import random_codec, synthetic_audio

ROWS = ShapeRule(growth=1.25, batch_seconds=4.0, max_rows=4)
CPU = compute_class("cpu")


@pytest.fixture(scope="module")
def uris(tmp_path_factory):
    """A codec with an SSL model, and the shipped one with log-mel features."""
    folder = tmp_path_factory.mktemp("tiny")
    card = CodecCard(name="tiny", is_trained=False, weights_licence="none")
    save_codec(random_codec(tiny(), seed=7, num_clips=4), card, folder)
    return {"tiny": str(folder), "nano": "hcodec-nano"}


def engine_of(uri, **settings):
    settings = EncodeSettings(**({"compute_class": CPU, "shapes": ROWS} | settings))
    return Engine(load_codec(uri, settings))


@pytest.fixture(scope="module", params=["tiny", "nano"])
def engine(request, uris):
    """Several rows to a batch: the harder case."""
    return engine_of(uris[request.param])


@pytest.fixture(scope="module")
def sound():
    torch.manual_seed(11)
    return synthetic_audio(1, 20, 16000)[0].numpy()


def cut(sound, start, length):
    return np.ascontiguousarray(sound[start : start + length])


def assert_same(found, expected):
    assert (found.num_frames, found.num_samples) == (expected.num_frames, expected.num_samples)
    assert found.codes.keys() == expected.codes.keys()
    for name, codes in expected.codes.items():
        assert codes.dtype == found.codes[name].dtype == np.int32
        assert np.array_equal(found.codes[name], codes)


CLIPS = st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 48_000)), min_size=1, max_size=9)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(places=CLIPS, order=st.randoms(use_true_random=False))
def test_codes_do_not_depend_on_company_or_order(engine, sound, places, order):
    clips = [cut(sound, start, length) for start, length in places]
    together = engine.encode_clips(clips)
    assert [tokens.num_samples for tokens in together] == [len(clip) for clip in clips]
    shuffled = list(range(len(clips)))
    order.shuffle(shuffled)
    again = engine.encode_clips([clips[index] for index in shuffled])
    for index, tokens in zip(shuffled, again, strict=True):
        assert_same(tokens, together[index])
    for clip, tokens in zip(clips, together, strict=True):
        assert_same(engine.encode_clips([clip])[0], tokens)


def test_neighbours_of_the_same_bucket_do_not_show(engine, sound):
    """Every row of a batch, beside zeros, loud noise and clips of other lengths."""
    clip = cut(sound, 5000, 20_000)
    alone = engine.encode_clips([clip])[0]
    generator = np.random.default_rng(0)
    for place in range(4):
        company = [
            (generator.standard_normal(generator.integers(17_000, 20_480)) * 30).astype(np.float32)
            for _ in range(3)
        ]
        company.insert(place, clip)
        assert_same(engine.encode_clips(company)[place], alone)


def test_decoded_audio_does_not_depend_on_company(engine, sound):
    clips = [cut(sound, start, length) for start, length in ((0, 20_000), (9, 700), (70, 19_000))]
    tokens = engine.encode_clips(clips)
    together = engine.decode_clips(tokens)
    for clip, one, audio in zip(clips, tokens, together, strict=True):
        assert audio.shape == clip.shape
        assert audio.dtype == np.float32
        assert np.array_equal(engine.decode_clips([one])[0], audio)


def test_on_a_cpu_a_clip_alone_is_the_released_loop(uris, sound):
    """The default shapes of a CPU add nothing to the one-file loop: the same bits."""
    settings = EncodeSettings(compute_class=CPU)
    assert settings.shapes.max_rows == 1
    codec = load_codec(uris["tiny"], settings)
    clips = [cut(sound, 0, length) for length in (1, 640, 15_000, 30_000)]
    for clip, tokens in zip(clips, Engine(codec).encode_clips(clips), strict=True):
        plain = codec.encode(torch.from_numpy(clip)[None, None], torch.tensor([len(clip)]))
        for name, codes in plain.clip(0).items():
            assert np.array_equal(codes, tokens.codes[name])


@pytest.mark.parametrize(
    "clip",
    [
        np.array([0.5], dtype=np.float32),
        np.zeros(16_000, dtype=np.float32),
        np.sign(np.sin(np.arange(16_000))).astype(np.float32),
        np.full(5000, 1e4, dtype=np.float32),
        np.full(5000, 1e-30, dtype=np.float32),
    ],
    ids=["one sample", "silence", "clipped", "huge", "denormal"],
)
def test_odd_clips_have_tokens_and_audio(engine, clip):
    tokens = engine.encode_clips([clip])[0]
    assert tokens.num_frames == -(-len(clip) // 640)
    for codes in tokens.codes.values():
        assert codes.shape[1] == tokens.num_frames
    audio = engine.decode_clips([tokens])[0]
    assert audio.shape == clip.shape
    assert np.isfinite(audio).all()


def test_no_clips_are_no_work(engine):
    assert engine.encode_clips([]) == []
    assert engine.decode_clips([]) == []


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        (np.zeros(0, dtype=np.float32), QuarantineReason.EMPTY),
        (np.array([0.0, np.nan], dtype=np.float32), QuarantineReason.NON_FINITE),
        (np.array([np.inf], dtype=np.float32), QuarantineReason.NON_FINITE),
    ],
)
def test_unusable_clips_carry_a_reason(engine, clip, reason):
    with pytest.raises(AudioError, match="Clip 1") as caught:
        engine.encode_clips([np.zeros(640, dtype=np.float32), clip])
    assert caught.value.reason is reason


@pytest.mark.parametrize("clip", [np.zeros((2, 640), dtype=np.float32), np.zeros(640)])
def test_other_shapes_and_types_are_refused(engine, clip):
    with pytest.raises(ConfigError, match=r"float32 \[N\]"):
        engine.encode_clips([clip])


def test_foreign_tokens_are_refused(engine, sound):
    tokens = engine.encode_clips([cut(sound, 0, 2000)])
    with pytest.raises(ForeignTokensError):
        engine.decode_clips(tokens, codebook_id="0" * 32)
    broken = dataclasses.replace(tokens[0], num_samples=10**7)
    with pytest.raises(ConfigError, match="claims 10000000"):
        engine.decode_clips([broken])


def test_fewer_codebooks(engine, sound):
    tokens = engine.encode_clips([cut(sound, 0, 20_000)])
    assert not np.array_equal(engine.decode_clips(tokens, 1)[0], engine.decode_clips(tokens)[0])


def test_batches_have_the_shape_that_their_clips_set(sound, monkeypatch):
    engine = engine_of("hcodec-nano")
    shapes = []
    encode = engine.codec._encode

    def record(audio, num_samples, with_margins):
        shapes.append((tuple(audio.shape), torch.get_num_threads()))
        return encode(audio, num_samples, with_margins)

    monkeypatch.setattr(engine.codec, "_encode", record)
    engine.encode_clips([cut(sound, 0, size) for size in (640, 20 * 640, 5000, 20 * 640, 10_000)])
    bounds = [ROWS.bucket_frames(frames) for frames in (20, 16, 8, 1)]
    expected = [
        ((ROWS.bucket_rows(bound, engine.codec.spec.frame_rate), 1, bound * 640), 1)
        for bound in sorted(set(bounds), reverse=True)
    ]
    assert shapes == expected


def test_fast_mode_gives_nearly_the_same_codes(sound):
    exact = engine_of("hcodec-nano")
    fast = engine_of("hcodec-nano", mode="fast")
    assert exact.codec.spec.encode_id != fast.codec.spec.encode_id
    clips = [cut(sound, size, size) for size in (3000, 30_000, 640, 12_000, 47_000)]
    for one, other in zip(exact.encode_clips(clips), fast.encode_clips(clips), strict=True):
        assert one.num_frames == other.num_frames
        for name, codes in one.codes.items():
            assert (codes == other.codes[name]).mean() > 0.9


def test_bfloat16_is_for_gpus_and_wide_codecs(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert narrow_type(cpu, "fast", 200_000_000) == torch.bfloat16
    assert narrow_type(cpu, "fast", 2_000_000) is None
    assert narrow_type(cpu, "exact", 200_000_000) is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    assert narrow_type(cpu, "fast", 200_000_000) is None


def test_what_is_narrow_reaches_the_codec(monkeypatch):
    engine = engine_of("hcodec-nano", mode="fast")
    seen = []
    encode = engine.codec._encode

    def record(audio, num_samples, with_margins):
        assert not torch.backends.cuda.matmul.allow_tf32, "code search would not be float32"
        seen.append((torch.is_autocast_enabled("cpu"), audio.dtype))
        return encode(audio, num_samples, with_margins)

    monkeypatch.setattr(engine.codec, "_encode", record)
    engine.encode_clips([np.zeros(6400, np.float32)])
    engine.narrow_type = torch.bfloat16
    engine.encode_clips([np.zeros(6400, np.float32)])
    assert seen == [(False, torch.float32), (True, torch.float32)]
    assert not torch.is_autocast_enabled("cpu")


def test_torch_is_left_as_it_was(sound):
    engine = engine_of("hcodec-nano")
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(2)
    torch.backends.cudnn.benchmark = True
    try:
        engine.encode_clips([cut(sound, 0, 2000)])
        assert torch.get_num_threads() == 2
        assert torch.backends.cudnn.benchmark
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_fast_mode_on_a_gpu_learns_its_batch_and_agrees_with_exact(sound):
    settings = EncodeSettings(mode="fast", compute_class=compute_class("cuda"))
    engine = Engine(load_codec("hcodec-nano", settings, device="cuda"))
    assert engine.narrow_type == torch.bfloat16
    generator = np.random.default_rng(1)
    clips = [
        cut(sound, int(generator.integers(0, 100_000)), int(generator.integers(8000, 100_000)))
        for _ in range(120)
    ]
    first = engine._encoder.budget.seconds
    agreement = measure_agreement(engine, engine.in_mode("exact"), clips)
    assert agreement.depths[0].stream == "semantic"
    assert agreement.depths[0].holding_share > 0.9
    assert engine._encoder.budget.seconds > first


def test_compute_class_names_what_decides_bits():
    version = torch.__version__.partition("+")[0]
    assert CPU.startswith("cpu-")
    assert CPU.endswith(f"-torch{version}")
    assert compute_class("cpu", num_threads=2) == f"{CPU}-threads2"
    with pytest.raises(ConfigError, match="no device 'meta'"):
        compute_class("meta")


def test_another_compute_class_is_refused():
    codec = load_codec("hcodec-nano", EncodeSettings(compute_class="nvidia-h200-torch2.13.0-cu128"))
    with pytest.raises(ConfigError, match="nvidia-h200"):
        Engine(codec)
    codec = load_codec("hcodec-nano", EncodeSettings(compute_class=CPU))
    with pytest.raises(ConfigError, match="threads2"):
        Engine(codec, num_threads=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("name", ["tiny", "nano"])
def test_on_a_gpu_company_does_not_show_either(uris, sound, name):
    settings = EncodeSettings(compute_class=compute_class("cuda"))
    engine = Engine(load_codec(uris[name], settings, device="cuda"))
    generator = np.random.default_rng(1)
    clips = [
        cut(sound, int(generator.integers(0, 200_000)), int(generator.integers(1, 100_000)))
        for _ in range(60)
    ]
    together = engine.encode_clips(clips)
    audio = engine.decode_clips(together)
    for index in generator.permutation(60)[:20]:
        company = [clips[i] for i in generator.permutation(60)[:7]]
        again = engine.encode_clips([*company, clips[index]])[-1]
        assert_same(again, together[index])
        assert np.array_equal(engine.decode_clips([together[index]])[0], audio[index])
