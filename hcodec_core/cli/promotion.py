"""Commands on registered codecs: ``registry``, ``gate``, ``promote``, ``rollback-codec``."""

from __future__ import annotations

import argparse
import getpass
from typing import TYPE_CHECKING

from hcodec_core.cli.evaluation import read_margins
from hcodec_core.cli.output import Commands, Output, add_config, add_json
from hcodec_core.config import Config, load_config
from hcodec_core.errors import EXIT_FAILURE, EXIT_OK
from hcodec_core.storage import Storage, open_storage

if TYPE_CHECKING:
    from hcodec_core.promotion.documents import GateDecision, HistoryStep, RegisteredCodec


def add_commands(commands: Commands) -> None:
    """Register the commands."""
    _add_registry(commands)
    gate = commands.add_parser("gate", help="decide from an evaluation whether to promote a codec")
    gate.add_argument("challenger", metavar="models:/NAME@challenger")
    gate.add_argument("evaluation_uri", metavar="EVALUATION_URI", help="its evaluation.json")
    gate.add_argument("--margins", type=_path, default=None, help="TOML (default: configuration)")
    gate.set_defaults(handler=_gate)
    promote = commands.add_parser("promote", help="make the challenger of a decision the champion")
    promote.add_argument("name")
    promote.add_argument("decision_id")
    promote.add_argument("--by", default=None, help="who asks (default: the user)")
    promote.set_defaults(handler=_promote)
    back = commands.add_parser("rollback-codec", help="make the champion before this one champion")
    back.add_argument("name")
    back.add_argument("--from-version", type=int, default=None, help="only if it is the champion")
    back.add_argument("--by", default=None, help="who asks (default: the user)")
    back.add_argument("--reason", default="")
    back.set_defaults(handler=_rollback)
    plan = commands.add_parser(
        "promotion-plan", help="say what a codec would mean for a dataset's tokens, with its cost"
    )
    plan.add_argument("dataset")
    plan.add_argument("--codec", required=True, help="models:/NAME@champion, or a codec URI")
    plan.set_defaults(handler=_plan)
    for parser in (gate, promote, back, plan):
        add_config(parser)
        add_json(parser)


def _add_registry(commands: Commands) -> None:
    registry = commands.add_parser("registry", help="list, show and register codecs (MLflow)")
    actions = registry.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="all registered codecs with their champions")
    listing.set_defaults(handler=_list)
    show = actions.add_parser("show", help="versions, aliases and history of one codec")
    show.add_argument("name")
    show.set_defaults(handler=_show)
    register = actions.add_parser("register", help="register a codec folder as the challenger")
    register.add_argument("name")
    register.add_argument("codec", metavar="CODEC_URI")
    register.add_argument("--data-version", default="", help="what it was trained on")
    register.add_argument("--git-revision", default="", help="of the code that trained it")
    register.add_argument("--training-run", default="", help="where its training was tracked")
    register.set_defaults(handler=_register)
    for parser in (listing, show, register):
        add_config(parser)
        add_json(parser)


def _path(text: str) -> object:
    from pathlib import Path

    return Path(text)


def _open(options: argparse.Namespace) -> tuple[Config, Storage]:
    config = load_config(options.config)
    return config, open_storage(config.storage)


def _list(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.promotion.codec_versions import CodecVersions

    config, _ = _open(options)
    versions = CodecVersions(config)
    rows = []
    for name in versions.names():
        aliases = versions.aliases(name)
        number = len(versions.versions(name))
        rows.append((name, number, aliases.get("champion", ""), aliases.get("challenger", "")))
    output.table("Registered codecs", ("codec", "versions", "champion", "challenger"), rows)


def _show(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.promotion.codec_versions import CodecVersions
    from hcodec_core.promotion.history import History

    config, storage = _open(options)
    versions = CodecVersions(config)
    aliases = versions.aliases(options.name)
    codecs = versions.versions(options.name)
    steps = History(config, storage, options.name).steps()
    if output.is_json:
        output.result(
            {
                "name": options.name,
                "aliases": aliases,
                "versions": [codec.model_dump(mode="json") for codec in codecs],
                "history": [step.model_dump(mode="json") for step in steps],
            }
        )
        return
    named = {v: ", ".join(sorted(a for a in aliases if aliases[a] == v)) for v in aliases.values()}
    output.tables(
        [
            (
                f"Versions of {options.name}",
                ("version", "alias", "digest", "decode id", "data", "code", "codec"),
                [_row(codec, named.get(codec.version, "")) for codec in codecs],
            ),
            (
                "History of its champion",
                ("step", "what", "from", "to", "when (UTC)", "by", "why"),
                [
                    (s.number, s.kind, s.from_version or "", s.to.version, s.at, s.by, s.reason)
                    for s in steps
                ],
            ),
        ]
    )


def _row(codec: RegisteredCodec, alias: str) -> tuple[object, ...]:
    trained = codec.digest[:12] if codec.is_trained else f"{codec.digest[:12]} (random weights)"
    return (
        codec.version,
        alias,
        trained,
        codec.decode_id[:12],
        codec.data_version,
        codec.git_revision[:12],
        codec.codec_uri,
    )


def _register(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.promotion.resolving import RegisterRequest, register_codec

    config, storage = _open(options)
    request = RegisterRequest(
        name=options.name,
        codec_uri=options.codec,
        data_version=options.data_version,
        git_revision=options.git_revision,
        training_run=options.training_run,
    )
    codec = register_codec(config, storage, request)
    output.result(codec.model_dump(mode="json"), f"Registered as {codec.uri}, the challenger.")


def _gate(options: argparse.Namespace, output: Output) -> int:
    from hcodec_core.promotion.codec_versions import CodecVersions
    from hcodec_core.promotion.deciding import decide
    from hcodec_core.promotion.resolving import find_version

    config, storage = _open(options)
    challenger = find_version(CodecVersions(config), options.challenger)
    gate = None if options.margins is None else read_margins(options.margins)
    decision = decide(config, storage, challenger, options.evaluation_uri, gate)
    output.result(decision.model_dump(mode="json"), _decision_text(decision))
    return EXIT_OK if decision.passed else EXIT_FAILURE


def _decision_text(decision: GateDecision) -> str:
    lines = [decision.verdict.sentence]
    lines += [f"  {metric.status}: {metric.sentence}" for metric in decision.verdict.metrics]
    lines.append(f"decision {decision.decision_id}")
    if decision.passed:
        lines.append(f"next     hcodec promote {decision.name} {decision.decision_id}")
    return "\n".join(lines)


def _promote(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.promotion.promoting import promote

    config, storage = _open(options)
    by = options.by if options.by is not None else _user()
    step = promote(config, storage, options.name, options.decision_id, by=by)
    output.result(step.model_dump(mode="json"), _step_text(step))


def _rollback(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.promotion.promoting import roll_back

    config, storage = _open(options)
    step = roll_back(
        config,
        storage,
        options.name,
        expected_version=options.from_version,
        by=options.by if options.by is not None else _user(),
        reason=options.reason,
    )
    output.result(step.model_dump(mode="json"), _step_text(step))


def _step_text(step: HistoryStep) -> str:
    before = "nobody" if step.from_version is None else f"version {step.from_version}"
    return f"Champion of {step.name} is version {step.to.version} (before: {before})."


def _plan(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.promotion.resolving import resolve_codec
    from hcodec_core.promotion.retokenising import plan_retokenising

    config, storage = _open(options)
    codec = resolve_codec(config, options.codec, storage)
    plan = plan_retokenising(config, storage, options.dataset, codec)
    output.result(plan.model_dump(mode="json"), plan.sentence)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
