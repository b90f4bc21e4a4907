"""Recipes: everything that decides what a training run gives, as one TOML file.

Recipes that ship lie in ``recipes/`` and are named without their ending. Times are in steps of the
generator unless the name says otherwise; loss weights of 0 switch a loss off.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hcodec_core.config import describe
from hcodec_core.errors import ConfigError
from hcodec_core.tokens import digest_of

_RECIPES_PATH = Path(__file__).parent / "recipes"
_LATER_ENTRIES = (
    ("", "learns_from"),
    ("optimizer", "ema_from"),
    ("losses", "codebook"),
    ("losses", "mel_head"),
    ("losses", "distillation"),
)
"""Entries that came after the first runs: at their defaults they are no part of the digest."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OptimizerRecipe(_Section):
    """AdamW with warm-up and a cosine down to ``final_share`` of the learning rate.

    ``clip_norm``: gradients' norm at most. ``ema_decay``: of averaged weights, which are validated
    and exported in place of the last ones; None: no averaging. Averages are the weights themselves
    before step ``ema_from``.
    """

    learning_rate: float = Field(default=3e-4, gt=0)
    discriminator_learning_rate: float = Field(default=3e-4, gt=0)
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    final_share: float = Field(default=0.01, ge=0, le=1)
    clip_norm: float = Field(default=5.0, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    ema_from: int = Field(default=0, ge=0)


class QuantizerRecipe(_Section):
    """How codebooks learn: moving averages of what is assigned to each entry.

    Codebooks that learn by gradients (U-Codec, HH-Codec) take ``gradient``, ``dropout_share``
    (U-Codec's) and, for what is logged of their use, ``decay``; their entries are not replaced.

    The defaults are those of the library with which H-Codec was published. ``dropout_share``: share
    of steps in which only the first so many codebooks are used. ``dead_below``: an entry hit less
    often (moving average of hits per step over all ranks) is replaced by a vector of the batch
    every ``replace_every`` steps; 0: never. ``start_batches``: batches whose latents the first
    codebooks are k-means centres of.
    """

    decay: float = Field(default=0.99, gt=0, lt=1)
    epsilon: float = Field(default=1e-5, gt=0)
    kmeans_steps: int = Field(default=50, ge=1)
    start_batches: int = Field(default=1, ge=1)
    dropout_share: float = Field(default=1.0, ge=0, le=1)
    dead_below: float = Field(default=0.0, ge=0)
    replace_every: int = Field(default=20, ge=1)
    gradient: Literal["rotation", "straight-through"] = "rotation"


class LossRecipe(_Section):
    """Weights of the losses. Adversarial training begins at ``adversarial_from``.

    ``codebook`` pulls entries towards what they stand for, where they learn by gradients.
    ``mel_head``: L1 of the log-mel that HH-Codec's vocoder hears. ``distillation``: HH-Codec's
    likeness of tokens to the teacher over time.
    """

    mel: float = Field(default=15.0, ge=0)
    mel_windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    mel_bands: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320)
    waveform: float = Field(default=0.0, ge=0)
    spectral: float = Field(default=0.0, ge=0)
    spectral_windows: tuple[int, ...] = (512, 1024, 2048)
    commitment: float = Field(default=1.0, ge=0)
    codebook: float = Field(default=1.0, ge=0)
    mel_head: float = Field(default=1.0, ge=0)
    distillation: float = Field(default=0.0, ge=0)
    semantic: float = Field(default=1.0, ge=0)
    semantic_form: Literal["l1", "mse"] = "l1"
    adversarial: float = Field(default=1.0, ge=0)
    feature_matching: float = Field(default=2.0, ge=0)
    adversarial_form: Literal["hinge", "least-squares"] = "hinge"
    adversarial_from: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.mel_windows) != len(self.mel_bands) or not self.mel_windows:
            raise ValueError("mel_windows and mel_bands must have the same length, at least 1")
        return self


class DiscriminatorRecipe(_Section):
    """Which discriminators judge, and how wide they are (``width``: channels of the first layer).

    Windows in samples. An empty list leaves a kind out.
    """

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_width: int = Field(default=32, ge=1)
    resolutions: tuple[int, ...] = (512, 1024, 2048)
    resolution_width: int = Field(default=32, ge=1)
    subband_windows: tuple[int, ...] = (512, 1024, 2048)
    subband_width: int = Field(default=32, ge=1)
    subband_edges: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


class DataRecipe(_Section):
    """What is drawn from the sources, and what is kept back.

    ``held_out_share`` of the groups is never trained on. A group is what ``speaker_pattern`` (a
    regular expression, its first group) finds in a URI, else the manifest's ``speaker``, else the
    file itself. ``synthetic_share`` of the samples is synthesised. More than ``max_bad_share`` of
    bad files stops the run.
    """

    held_out_share: float = Field(default=0.05, gt=0, lt=1)
    max_held_out_files: int = Field(default=32, ge=1)
    held_out_seconds: float = Field(default=4.0, gt=0)
    speaker_pattern: str | None = None
    synthetic_share: float = Field(default=0.0, ge=0, lt=1)
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    min_seconds: float = Field(default=0.1, gt=0)
    allows_lower_rates: bool = False


class AugmentRecipe(_Section):
    """How training samples are varied; each range is drawn from evenly.

    ``peak``: the crop's peak is scaled to it; None: left alone. ``equaliser_db``: largest gain or
    cut of a smooth random equaliser. ``noise_share`` of the samples get noise at ``noise_snr_db``.
    ``speed``: factor on the speed (and pitch).
    """

    peak: tuple[float, float] | None = (0.1, 0.99)
    equaliser_share: float = Field(default=0.0, ge=0, le=1)
    equaliser_db: float = Field(default=6.0, ge=0)
    noise_share: float = Field(default=0.0, ge=0, le=1)
    noise_snr_db: tuple[float, float] = (15.0, 40.0)
    speed: tuple[float, float] = (1.0, 1.0)


class CadenceRecipe(_Section):
    """How often things happen; decides nothing about the weights."""

    log_every: int = Field(default=50, ge=1)
    validate_every: int = Field(default=1000, ge=1)
    checkpoint_every: int = Field(default=1000, ge=1)
    samples_every: int = Field(default=5000, ge=1)
    num_samples: int = Field(default=2, ge=0)
    keep_last: int = Field(default=3, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.checkpoint_every % self.validate_every:
            raise ValueError("checkpoint_every must be a multiple of validate_every")
        return self


class Recipe(_Section):
    """A whole recipe. ``codec``: preset whose shape is trained when nothing is built upon.

    ``batch_size``: clips of one step over all ranks. ``train``: ``decoder`` keeps everything that
    decides tokens as it is. ``initial``: first weights, torch's own or such as keep the variance.
    ``dropout``: probability in the layers that have dropout. ``precision``: of products; bfloat16
    needs a GPU, on a CPU all is float32. ``learns_from``: first step at which a module of the codec
    (``vocoder``) learns; before, it stays as it is, in eval mode.
    """

    format_version: Literal[1] = 1
    name: str
    codec: str
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    crop_seconds: float = Field(gt=0)
    seed: int = Field(default=0, ge=0)
    train: Literal["all", "decoder"] = "all"
    initial: Literal["torch", "keep-variance"] = "torch"
    dropout: float = Field(default=0.1, ge=0, lt=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    learns_from: dict[str, int] = Field(default_factory=dict)
    optimizer: OptimizerRecipe = OptimizerRecipe()
    quantizer: QuantizerRecipe = QuantizerRecipe()
    losses: LossRecipe = LossRecipe()
    discriminators: DiscriminatorRecipe = DiscriminatorRecipe()
    data: DataRecipe = DataRecipe()
    augment: AugmentRecipe = AugmentRecipe()
    cadence: CadenceRecipe = CadenceRecipe()

    @property
    def digest(self) -> str:
        """Digest of all that decides weights: a run goes on only under the same one."""
        values = self.model_dump(mode="json", exclude={"name", "cadence"})
        del values["data"]["max_bad_share"]  # whoever meets this limit may raise it and go on
        _drop_unused(values, self.model_dump(exclude_defaults=True))
        return digest_of(values)

    @property
    def is_adversarial(self) -> bool:
        """Whether discriminators are trained at any step."""
        return (
            self.losses.adversarial + self.losses.feature_matching > 0
            and self.losses.adversarial_from < self.steps
        )


def recipe_names() -> list[str]:
    """Recipes that ship."""
    return sorted(path.stem for path in _RECIPES_PATH.glob("*.toml"))


def load_recipe(name_or_path: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe that ships, or a TOML file.

    Args:
        name_or_path: ``nano``, or a path that ends with ``.toml``.
        changes: Entries that replace those of the file: ``{"steps": 100, "losses.mel": 45}``.

    Raises:
        ConfigError: There is no such recipe, or an entry is wrong; names each.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = _RECIPES_PATH / f"{name_or_path}.toml"
        if not path.is_file():
            raise ConfigError(
                f"There is no recipe {name_or_path!r}: there are {', '.join(recipe_names())}, or "
                "name a TOML file."
            )
    try:
        entries = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe {path} is not TOML: {error}.") from error
    return recipe_of(_changed(entries, changes or {}), str(path))


def recipe_of(entries: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """A recipe from its entries. Raises ``ConfigError`` naming each wrong one."""
    try:
        return Recipe.model_validate(entries)
    except ValidationError as error:
        raise ConfigError(f"The recipe {origin} cannot be used: {describe(error)}.") from error


def _drop_unused(values: dict[str, Any], changed: Mapping[str, Any]) -> None:
    """Take later entries that say nothing out of ``values``: runs begun before them go on."""
    for section, entry in _LATER_ENTRIES:
        if entry not in (changed.get(section, {}) if section else changed):
            del (values[section] if section else values)[entry]


def _changed(entries: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        section, _, entry = name.rpartition(".")
        target = entries.setdefault(section, {}) if section else entries
        if not isinstance(target, dict):
            raise ConfigError(f"A recipe has no entry {name!r}.")
        target[entry] = value
    return entries
