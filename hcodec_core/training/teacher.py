"""SSL models that codecs learn from: read, checked against what a codec was built for, frozen."""

from __future__ import annotations

from hcodec_core.errors import ConfigError
from hcodec_core.models.base import Codec
from hcodec_core.models.conversion import read_ssl_model
from hcodec_core.models.hcodec.model import HCodec
from hcodec_core.nn.ssl import SslModel
from hcodec_core.nn.ssl_config import SslConfig


def take_teacher(codec: Codec, teacher: str | None, name: str) -> None:
    """Fill the SSL model of a codec that has one; ``name`` is the codec's in messages.

    Args:
        codec: With random weights.
        teacher: Folder or hub id (transformers). Where the codec names the layers that it looks at,
            there may be more.
        name: Of the codec.

    Raises:
        ConfigError: No teacher is named, it is of another shape, or the codec takes none.
        CheckpointError: It cannot be read.
    """
    ssl = getattr(codec, "ssl", None)
    if ssl is None:
        return
    if not isinstance(codec, HCodec) or codec.ssl is None:
        raise ConfigError(
            f"Codec {name} can only be fine-tuned: name a codec to go on from with --base."
        )
    if teacher is None:
        raise ConfigError(
            f"Codec {name} learns from an SSL model, which has no weights yet: name its folder "
            "with --teacher, or a codec to go on from with --base."
        )
    config, tensors = read_ssl_model(teacher)
    wanted = codec.ssl.config
    if codec.config.ssl_layers is not None and config.num_hidden_layers > wanted.num_hidden_layers:
        config = config.model_copy(update={"num_hidden_layers": wanted.num_hidden_layers})
    _check_shape(config, wanted, teacher, name)
    codec.ssl.load_state_dict({key: tensors[key] for key in codec.ssl.state_dict()})


def _check_shape(found: SslConfig, wanted: SslConfig, teacher: str, name: str) -> None:
    for field in SslConfig.model_fields:
        has, needs = getattr(found, field), getattr(wanted, field)
        if has != needs:
            raise ConfigError(
                f"The SSL model {teacher!r} does not fit codec {name}: its {field} is {has}, "
                f"the codec's {needs}."
            )


def read_teacher(teacher: str) -> SslModel:
    """An SSL model beside a codec, frozen and in eval mode, on the CPU.

    Raises ``CheckpointError`` when it cannot be read.
    """
    config, tensors = read_ssl_model(teacher)
    ssl = SslModel(config)
    ssl.load_state_dict(dict(tensors))
    return ssl.eval().requires_grad_(False)
