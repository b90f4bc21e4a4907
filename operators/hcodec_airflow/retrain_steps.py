"""What the tasks of ``retrain_codec`` do, free of Airflow: each returns a few plain values.

Every step may be repeated: jobs, decisions and promotions are named by their content.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hcodec_airflow.retrain_requests import CHAMPION, SCRATCH, RetrainRequest, RollbackRequest
from hcodec_airflow.settings import Settings, read_settings
from hcodec_airflow.steps import size_text
from hcodec_core.errors import ConfigError, ObjectMissingError

if TYPE_CHECKING:
    from hcodec_core.config import Config
    from hcodec_core.jobs import CodecPin
    from hcodec_core.promotion.documents import GateDecision, HistoryStep, RegisteredCodec
    from hcodec_core.promotion.retokenising import RetokenisePlan
    from hcodec_core.storage import Storage
    from hcodec_core.training.job import PinnedTraining, TrainJobRequest

logger = logging.getLogger(__name__)
_SECONDS_PER_HOUR = 3600.0


def pin(request: RetrainRequest) -> dict[str, Any]:
    """Pin base, recipe and data, write the training's job, and log what it would take.

    ``ends_run`` in a dry run, which writes nothing. Raises ``ConfigError`` for anything that can be
    known to be wrong before the training.
    """
    from hcodec_core.evaluation.metrics import check_names
    from hcodec_core.jobs import JOB_FILE
    from hcodec_core.storage import join_uri
    from hcodec_core.training.job import make_train_job

    settings = read_settings()
    config, storage = _open(settings)
    check_names(list(request.gate(config.gate).metrics))
    _check_datasets(config, request)
    backends = _backends(request, settings)
    wanted = _train_request(config, storage, request)
    pinned = make_train_job(config, storage, wanted, dry_run=request.dry_run)
    estimate = _estimate(config, storage, wanted)
    for line in describe_training(request, wanted, pinned, estimate):
        logger.info("%s", line)
    return {
        "job_uri": "" if request.dry_run else join_uri(pinned.job.plan_uri, JOB_FILE),
        "run_uri": pinned.job.plan_uri,
        "data_version": _data_version(pinned),
        "versions": [_facts_of_version(version) for version in pinned.versions],
        "data": list(pinned.job.data_uris),
        "base": None if wanted.base is None else wanted.base.model_dump(),
        "num_files": len(pinned.sources.training),
        "ends_run": request.dry_run,
        **backends,
        **estimate,
    }


def _facts_of_version(version: Any) -> dict[str, Any]:
    return {
        "table_uri": version.table_uri,
        "version": version.version,
        "snapshot_id": version.snapshot_id,
    }


def _train_request(config: Config, storage: Storage, request: RetrainRequest) -> TrainJobRequest:
    from hcodec_core.training.job import TrainJobRequest
    from hcodec_core.training.recipe import load_recipe

    recipe = load_recipe(request.recipe, request.recipe_changes())
    base = _base(config, storage, request)
    if recipe.train == "decoder" and base is None:
        raise ConfigError(
            "To train the decoder alone keeps the encoder of a codec: start from the champion, or "
            "name a codec."
        )
    return TrainJobRequest(
        recipe=recipe,
        data_uris=request.data,
        base=base,
        teacher=request.teacher,
        kept_back_uri=request.held_out,
        num_ranks=request.num_ranks,
        experiment=request.codec,
    )


def _base(config: Config, storage: Storage, request: RetrainRequest) -> CodecPin | None:
    from hcodec_core.promotion.resolving import resolve_codec

    if request.base == SCRATCH:
        return None
    if request.base != CHAMPION:
        return resolve_codec(config, request.base, storage).pin()
    champion = _champion(config, request.codec)
    if champion is None:
        raise ConfigError(
            f"There is no champion of {request.codec} yet: choose scratch, or name a codec to "
            "start from."
        )
    return champion.pin()


def _champion(config: Config, name: str) -> RegisteredCodec | None:
    from hcodec_core.promotion.codec_versions import CodecVersions
    from hcodec_core.promotion.deciding import champion_of

    versions = CodecVersions(config)
    return champion_of(versions, name) if name in versions.names() else None


def _check_datasets(config: Config, request: RetrainRequest) -> None:
    from hcodec_core.dataset.table import find_layout

    for dataset in request.datasets or ():
        find_layout(config, dataset)


def _backends(request: RetrainRequest, settings: Settings) -> dict[str, str]:
    """Training on a cluster needs its own kind of job; the evaluation is one plain worker."""
    if (request.backend or settings.backend) != "local":
        return {"train_backend": "trainjob", "evaluate_backend": "kubernetes"}
    if request.nodes > 1:
        raise ConfigError(
            f"The backend local has one node, {request.nodes} were asked for: choose GPUs per "
            "node, or backend kubernetes."
        )
    return {"train_backend": "local", "evaluate_backend": "local"}


def _estimate(config: Config, storage: Storage, wanted: TrainJobRequest) -> dict[str, Any]:
    """Hours of crops, of GPUs (on a CPU: processes) and of the clock, and the cost."""
    from hcodec_core.codecs import load_manifest

    recipe, cost = wanted.recipe, config.cost
    name = recipe.codec
    if wanted.base is not None:
        name = load_manifest(wanted.base.uri, fetch=storage.read).name
    factor = cost.training_realtime_factors.get(name, cost.default_training_realtime_factor)
    crop_hours = recipe.steps * recipe.batch_size * recipe.crop_seconds / _SECONDS_PER_HOUR
    gpu_hours = crop_hours / factor
    return {
        "steps": recipe.steps,
        "crop_hours": round(crop_hours, 4),
        "gpu_hours": round(gpu_hours, 4),
        "clock_hours": round(gpu_hours / wanted.num_ranks, 4),
        "cost": round(gpu_hours * cost.worker_hour, 4),
        "currency": cost.currency,
        "is_measured": name in cost.training_realtime_factors,
    }


def describe_training(
    request: RetrainRequest,
    wanted: TrainJobRequest,
    pinned: PinnedTraining,
    estimate: Mapping[str, Any],
) -> list[str]:
    """What a training means, for people."""
    recipe, job = wanted.recipe, pinned.job
    start = "scratch" if wanted.base is None else wanted.base.version or wanted.base.uri
    guess = "" if estimate["is_measured"] else " (a guess: cost.training_realtime_factors)"
    size = f", {size_text(pinned.num_bytes)}" if pinned.num_bytes else ""
    lines = [
        f"Codec {request.codec}, from {start}; recipe {recipe.name} ({recipe.digest[:12]}), "
        f"{recipe.train} parts, {recipe.steps} steps of {recipe.batch_size} clips of "
        f"{recipe.crop_seconds:g} s",
        f"Data {', '.join(job.data_uris)}: {len(pinned.sources.training)} files to train on, "
        f"{len(pinned.sources.held_out)} to validate with{size}; {pinned.num_kept_back} left out "
        f"for the evaluation on {request.held_out}",
        f"{request.nodes} x {request.gpus} processes; estimate: {estimate['crop_hours']:.2f} h of "
        f"crops, {estimate['gpu_hours']:.2f} GPU hours, {estimate['clock_hours']:.2f} h, "
        f"{estimate['cost']:.2f} {estimate['currency']}{guess}",
    ]
    if request.dry_run:
        return [*lines, "Dry run: nothing is trained."]
    return [*lines, f"Run {job.plan_id}: {job.plan_uri}"]


def _data_version(pinned: PinnedTraining) -> str:
    """What the registry tells of the data: versions with their table, places, and the list."""
    versions = {v.uri: f"{v.uri}#{v.encode_id[:12]}" for v in pinned.versions}
    named = [versions.get(uri, uri) for uri in pinned.job.data_uris]
    return "; ".join([*named, f"list {pinned.sources.digest[:12]}"])


def export(request: RetrainRequest, pinned: Mapping[str, Any]) -> dict[str, Any]:
    """Check and register what was trained as the challenger, and write the evaluation's job.

    ``ends_run`` when the very same weights are the champion already.
    """
    from hcodec_core import __version__
    from hcodec_core.codecs import load_manifest
    from hcodec_core.promotion.resolving import RegisterRequest, register_codec
    from hcodec_core.training.job import finished

    config, storage = _open(read_settings())
    result = finished(storage, pinned["run_uri"])
    if result is None:
        raise ObjectMissingError(f"The training {pinned['run_uri']} has no result: clear train.")
    known = _champion(config, request.codec)
    if known is not None and known.digest == result.codec_digest:
        logger.info("%s has the same weights and is the champion: nothing to do.", known.uri)
        return {"codec": known.uri, "ends_run": True, "job_uri": ""}
    codec = register_codec(
        config,
        storage,
        RegisterRequest(
            name=request.codec,
            codec_uri=result.codec_uri,
            data_version=pinned["data_version"],
            git_revision=f"hcodec-pipelines {__version__}",
            training_run=pinned["run_uri"],
        ),
    )
    logger.info("Registered as %s, the challenger, with digest %s", codec.uri, codec.digest)
    return {
        "codec": codec.uri,
        "version": codec.version,
        "digest": codec.digest,
        "codec_uri": codec.codec_uri,
        "manifest_name": load_manifest(codec.codec_uri, fetch=storage.read).name,
        "ends_run": False,
        **_evaluation(config, storage, request, codec, known),
    }


def _evaluation(
    config: Config,
    storage: Storage,
    request: RetrainRequest,
    codec: RegisteredCodec,
    champion: RegisteredCodec | None,
) -> dict[str, Any]:
    from hcodec_core.evaluation.job import EvaluateRequest, make_evaluate_job, result_uri
    from hcodec_core.jobs import JOB_FILE
    from hcodec_core.storage import join_uri

    wanted = EvaluateRequest(
        codec=codec.pin(),
        held_out_uri=request.held_out,
        against=None if champion is None else champion.pin(),
        max_files=request.max_files,
        gate=request.gate(config.gate),
    )
    job = make_evaluate_job(config, storage, wanted)
    against = "no champion yet" if champion is None else f"champion {champion.uri}"
    logger.info("To be evaluated on %d files, against: %s", job.num_files, against)
    return {
        "champion": None if champion is None else champion.version,
        "job_uri": join_uri(job.plan_uri, JOB_FILE),
        "evaluation_uri": result_uri(job.plan_uri),
    }


def judge(request: RetrainRequest, exported: Mapping[str, Any]) -> dict[str, Any]:
    """The gate's decision about the challenger, and what its promotion would mean for tokens."""
    from hcodec_core.promotion.codec_versions import CodecVersions
    from hcodec_core.promotion.deciding import decide

    settings = read_settings()
    config, storage = _open(settings)
    challenger = CodecVersions(config).get(request.codec, exported["version"])
    gate = request.gate(config.gate)
    decision = decide(config, storage, challenger, exported["evaluation_uri"], gate)
    report_url = settings.browser_url(decision.report_uri)
    plans = _plans(config, storage, request, exported) if decision.passed else []
    for line in [decision.verdict.sentence, *_metric_lines(decision), f"Report: {report_url}"]:
        logger.info("%s", line)
    return {
        "decision_id": decision.decision_id,
        "passed": decision.passed,
        "sentence": decision.verdict.sentence,
        "report_url": report_url,
        "subject": f"Promote {challenger.name} version {challenger.version} to champion?",
        "body": _question(decision, challenger, report_url, plans),
    }


def _metric_lines(decision: GateDecision) -> list[str]:
    return [f"{metric.status}: {metric.sentence}" for metric in decision.verdict.metrics]


def _question(
    decision: GateDecision,
    challenger: RegisteredCodec,
    report_url: str,
    plans: Sequence[RetokenisePlan],
) -> str:
    """What a person is told who is to say yes or no, as Markdown."""
    champion = "nobody" if decision.champion is None else f"version {decision.champion.version}"
    return "\n".join(
        [
            f"**{decision.verdict.sentence}**",
            "",
            *(f"- {line}" for line in _metric_lines(decision)),
            "",
            f"[Evaluation report]({report_url})",
            "",
            f"Champion now: {champion}. Trained on: {challenger.data_version}.",
            "",
            *(f"- {plan.sentence}" for plan in plans),
            *(["No dataset has tokens of this codec."] if not plans else []),
        ]
    )


def refusal_of(codec: str, decision_id: str) -> str:
    """Who turned a decision down and why, "" when nobody did."""
    from hcodec_core.promotion.deciding import find_rejection

    config, storage = _open(read_settings())
    found = find_rejection(config, storage, codec, decision_id)
    if found is None:
        return ""
    return f"Turned down by {found.by or 'somebody'}: {found.reason or 'no reason given'}."


def reject(codec: str, decision_id: str, by: str, reason: str) -> str:
    """Record that a person said no; the sentence for the log."""
    from hcodec_core.promotion import deciding

    config, storage = _open(read_settings())
    deciding.reject(config, storage, codec, decision_id, by=by, reason=reason)
    return refusal_of(codec, decision_id)


def promote(codec: str, decision_id: str, by: str) -> dict[str, Any]:
    """Make the challenger of a decision the champion; the facts for the asset's event."""
    from hcodec_core.promotion import promoting

    config, storage = _open(read_settings())
    return _facts_of(promoting.promote(config, storage, codec, decision_id, by=by))


def roll_back(request: RollbackRequest, by: str) -> dict[str, Any]:
    """Make the champion before this one the champion again; the facts for the asset's event."""
    from hcodec_core.promotion import promoting

    config, storage = _open(read_settings())
    step = promoting.roll_back(
        config,
        storage,
        request.codec,
        expected_version=request.champion,
        by=by,
        reason=request.reason,
    )
    return _facts_of(step)


def _facts_of(step: HistoryStep) -> dict[str, Any]:
    logger.info("Champion of %s: version %d", step.name, step.to.version)
    return {
        "codec": step.name,
        "kind": step.kind,
        "version": step.to.version,
        "from_version": step.from_version,
        "codec_uri": step.to.codec_uri,
        "digest": step.to.digest,
        "decision_id": step.decision_id,
        "by": step.by,
        "reason": step.reason,
        "at": step.at,
    }


def plan_tokens(
    request: RetrainRequest, exported: Mapping[str, Any], decision_id: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Log what the promotion means for the datasets: the plans, and the runs that it asks for."""
    config, storage = _open(read_settings())
    plans = _plans(config, storage, request, exported)
    for plan in plans:
        logger.info("%s", plan.sentence)
    if not plans:
        logger.info("No dataset has tokens of this codec: nothing to tokenise anew.")
    changing = [plan for plan in plans if plan.changes_tokens]
    if changing and not request.tokenise:
        logger.info("Only planned: switch 'Tokenise them' on, or run tokenize_corpus by hand.")
    runs = [_run_of(request, plan, decision_id) for plan in changing if _can_start(request, plan)]
    return [plan.model_dump(mode="json") for plan in plans], runs


def _plans(
    config: Config, storage: Storage, request: RetrainRequest, exported: Mapping[str, Any]
) -> list[RetokenisePlan]:
    from hcodec_core.promotion.resolving import ResolvedCodec
    from hcodec_core.promotion.retokenising import datasets_of, plan_retokenising

    codec = ResolvedCodec(exported["codec_uri"], exported["digest"], exported["codec"])
    names = request.datasets
    if names is None:
        names = tuple(datasets_of(config, storage, exported["manifest_name"]))
    return [plan_retokenising(config, storage, name, codec) for name in names]


def _can_start(request: RetrainRequest, plan: RetokenisePlan) -> bool:
    if request.tokenise and len(plan.sources) != 1:
        logger.warning(
            "Dataset %s has %d sources, the form of tokenize_corpus one: start it by its own DAG.",
            plan.dataset,
            len(plan.sources),
        )
    return request.tokenise and len(plan.sources) == 1


def _run_of(request: RetrainRequest, plan: RetokenisePlan, decision_id: str) -> dict[str, Any]:
    """A run of ``tokenize_corpus``; its id is the same however often it is asked for."""
    settings = plan.settings
    return {
        "run_id": f"retokenise__{plan.dataset}__{plan.new_encode_id[:12]}__{decision_id[:12]}",
        "conf": {
            "source": plan.sources[0],
            "dataset": plan.dataset,
            "codec": plan.codec_uri,
            "mode": settings.mode,
            "channel": settings.channel,
            "gain": settings.gain,
            "threshold": settings.threshold,
            "workers": request.tokenise_workers,
            "backend": request.backend,
            "profile": request.tokenise_profile,
        },
    }


def _open(settings: Settings) -> tuple[Config, Storage]:
    return settings.load_config(), settings.open_storage()
