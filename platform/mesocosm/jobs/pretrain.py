"""The pretrain job: datasets -> a world, by DeepSpeed under Ray Train.

Training state lives under `runs/checkpoints/<world id>`, so that the same command run again goes on
where it stopped.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mesocosm.cluster import ray_session
from mesocosm.config import fingerprint
from mesocosm.data.analysis.evidence import evidence
from mesocosm.data.format.dataset import Dataset
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.errors import ArtifactError, MesocosmError, UsageError
from mesocosm.model import counts
from mesocosm.runs import tracking
from mesocosm.store.artifacts import SCHEMA, Artifact, Storage
from mesocosm.train import checkpoint, prepare
from mesocosm.train.config import DEFAULT_STEPS, PretrainConfig, what
from mesocosm.train.engine import least_gib, stage
from mesocosm.train.export import calibrate, check_termination, world_of
from mesocosm.train.feed import Feed
from mesocosm.train.worker import Work, train_loop
from mesocosm.versions import VERSIONS

__all__ = ["PretrainConfig", "plan", "run"]

LISTENS, LISTENS_REMOTE = 0.2, 2.0
"""Seconds between looks at what rank 0 said: on a remote root each is a request that is paid for.
"""

STARTS = 7
"""Attempts at starting the workers after the first, of two minutes each (`cluster.ensure`): where
nodes have left, Ray Train itself would try for ever.
"""


def plan(config: PretrainConfig) -> dict[str, Any]:
    """What `run` would do, and its size. Raises UsageError as `run` does before it starts."""
    config.validate()
    dataset = _opened(config)
    codec = prepare.fit_codec(dataset)
    steps, loader = _steps(
        config, prepare.narrowed(dataset, config.data.unique, config.seed), codec
    )
    sizes = counts.params(codec.spec, config.model)
    gpus = _gpus(config)
    train = replace(config.train, precision=_precision(config, gpus))
    return {
        "world": f"worlds/{_id(config, dataset, gpus)}",
        "datasets": ", ".join(dataset.ids),
        "params": sizes.n,
        "total_params": sizes.total,
        "steps": steps,
        "transitions": loader.transitions_seen(steps),
        "unique": loader.transitions_per_epoch,
        "epochs": round(steps * config.train.batch / loader.windows_per_epoch, 2),
        "flops": steps * prepare.step_flops(codec.spec, config.model, config.train),
        "memory_gib": round(least_gib(sizes.total, train, train.workers, on_gpu=gpus > 0), 2),
    }


def run(config: PretrainConfig, run: tracking.Run) -> Artifact:
    """Pretrain, or find, the world that `config` describes. Raises UsageError before anything
    starts, MesocosmError after.
    """
    config.validate()
    dataset = _opened(config)
    if config.ray.address is not None:
        ray_session.ensure(config.ray)
    gpus = _gpus(config)
    id = _id(config, dataset, gpus)
    run.record(inputs={"datasets": dataset.ids}, artifact=f"worlds/{id}")
    with run.making("worlds", id, config) as artifact:
        if artifact is None:
            return _make(config, run, dataset, id, gpus)
        run.say(f"found {artifact.name}")
        return artifact


def _make(
    config: PretrainConfig, run: tracking.Run, dataset: Dataset, id: str, gpus: float
) -> Artifact:
    storage, folder = run.storage, checkpoint.folder_of(id)
    if config.force:
        storage.remove(folder)
    last = checkpoint.latest(storage, id)
    if last is not None:
        checkpoint.refuse_other_stage(
            last[1], stage(replace(config.train, precision=_precision(config, gpus)))
        )
    codec = prepare.fitted_codec(storage, folder, dataset)
    dataset = prepare.narrowed(dataset, config.data.unique, config.seed)
    steps, loader = _steps(config, dataset, codec)
    if last is None or not last[1].done:
        ray_session.ensure(config.ray)
        ray_session.preflight(
            what=f"train.workers={config.train.workers}",
            cpus=config.train.workers,
            gpus=config.train.workers * gpus,
        )
        if last is not None:
            run.say(f"going on from step {last[1].step} of {steps}")
        train = replace(config.train, precision=_precision(config, gpus))
        work = Work(
            id,
            storage.root,
            replace(config.data, datasets=dataset.ids),
            config.model,
            train,
            steps,
            config.seed,
        )
        _train(work, config, run, dataset, codec, gpus)
        last = checkpoint.latest(storage, id)
    if last is None or not last[1].done:
        raise MesocosmError(
            f"training of worlds/{id} ended before step {steps}; run the same command again to"
            " go on"
        )
    artifact = _export(config, run, dataset, codec, loader, id, *last)
    tracking.register_world(run, artifact)
    storage.remove(folder)
    return artifact


def _train(
    work: Work,
    config: PretrainConfig,
    run: tracking.Run,
    dataset: Dataset,
    codec: Codec,
    gpus: float,
) -> None:
    """Train on the cluster, mirroring what rank 0 says into `run`; fits the base while the workers
    start.
    """
    folder = checkpoint.folder_of(work.id)
    feed = Feed(run.storage, folder)
    feed.clear()
    trainer = _trainer(work, config, run.storage, gpus)
    errors: list[BaseException] = []
    ended = (
        threading.Event()
    )  # an interrupted Thread.join takes the thread for ended (CPython 3.11)

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    failed: str | None = None
    with run.progress(
        f"pretrain {work.model.family} {work.model.size}", total=work.steps
    ) as update:
        try:
            thread.start()
            prepare.while_workers_start(
                run.storage, folder, dataset, codec, work.model, work.train, work.seed
            )
            alive = True
            while alive and failed is None:
                alive = not ended.wait(LISTENS_REMOTE if run.storage.remote else LISTENS)
                for record in feed.take():
                    failed = record.get("failed", failed)
                    if "step" in record:
                        step = record.pop("step")
                        run.log(record, step)
                        update(step, _note(record))
        except BaseException:
            feed.stop("the driver was interrupted")
            raise
        finally:
            if thread.ident is not None:  # the workers keep a checkpoint before they end
                ended.wait(config.stop.grace_s)
    if failed is not None:
        raise MesocosmError(failed)
    if errors:
        from ray.exceptions import RayError
        from ray.train.v2.api.exceptions import ControllerError

        if isinstance(errors[0], RayError):
            raise MesocosmError(
                f"the process that controls pretraining was lost ({type(errors[0]).__name__}); run"
                " the same command again to go on from its last checkpoint"
            ) from errors[0]
        if isinstance(errors[0], ControllerError):
            ray_session.stuck(
                f"train.workers={work.train.workers} of pretraining were not to be started in"
                f" {STARTS + 1} attempts"
            )
        last = str(errors[0]).strip().splitlines()[-1:] or [type(errors[0]).__name__]
        raise MesocosmError(
            f"pretraining's workers failed more than train.max_failures={work.train.max_failures}"
            f" times: {last[0]}; run again to go on"
        ) from errors[0]


def _trainer(work: Work, config: PretrainConfig, storage: Storage, gpus: float) -> Any:
    # A poll every 2 s and the watch for preempted nodes (a process of its own) cost seconds of
    # every run.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    if config.ray.address is None:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig

    from mesocosm.train.trainer import Trainer

    filesystem, base = storage.arrow()
    path, _, name = checkpoint.folder_of(work.id).rpartition("/")
    return Trainer(
        train_loop,
        private=config.ray.address is None,
        train_loop_config={"work": work},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=work.train.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=f"{base}/{path}",
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=work.train.max_failures, controller_failure_limit=STARTS
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=work.train.keep_checkpoints),
        ),
    )


def _export(
    config: PretrainConfig,
    run: tracking.Run,
    dataset: Dataset,
    codec: Codec,
    loader: Loader,
    id: str,
    path: str,
    progress: checkpoint.Progress,
) -> Artifact:
    import ray.train

    storage = run.storage
    base = prepare.read_base(storage, checkpoint.folder_of(id), codec.spec, config.model)
    assert base is not None, "a finished training has its base"
    filesystem, prefix = storage.arrow()
    with ray.train.Checkpoint(f"{prefix}/{path}", filesystem).as_directory() as folder:
        checkpoint.verify(Path(folder))
        world = world_of(Path(folder) / checkpoint.MODEL, base, codec, config.model)
    calibrate(world, dataset, codec, config.seed)
    ending = check_termination(world, dataset, codec, config.seed)
    shown = evidence(dataset, seed=config.seed)
    last = dict(progress.validations[-1]) if progress.validations else {}
    last.pop("step", None)
    facts = {"termination_recall": ending.recall, "termination_precision": ending.precision}
    metrics = (
        last
        | progress.measured
        | {name: value for name, value in facts.items() if value is not None}
    )
    sizes = counts.params(codec.spec, config.model)
    seen, unique = loader.transitions_seen(progress.steps), loader.transitions_per_epoch
    flops = progress.steps * prepare.step_flops(codec.spec, config.model, config.train)
    meta = {
        "inputs": {"datasets": dataset.ids},
        "config": what(config, progress.precision),
        "job": "pretrain",
        "run": run.id,
        "codec": codec.id,
        "metrics": metrics,
        "checks": {"termination": ending.verdict, "actions": shown.unidentified() or "passed"},
        "evidence": shown.to_json(),
        "counts": {
            "params": sizes.n,
            **asdict(sizes),
            "flops": flops,
            "data": seen,
            "unique": unique,
            "epochs": seen / unique,
            "steps": progress.steps,
        },
        "seconds": progress.seconds,
    }
    artifact = storage.make("worlds", id, meta, world.save, force=config.force)
    run.log(metrics, progress.steps)
    run.record(metrics=metrics, checks=meta["checks"])
    if (unidentified := shown.unidentified()) is not None:
        run.say(f"warning: {unidentified}")
    if ending.verdict.startswith("failed"):
        run.say(f"warning: termination check {ending.verdict}")
    elif ending.recall is not None:
        run.say(
            f"termination ({ending.measured_on}): recall {ending.recall:.2f}, precision"
            f" {(ending.precision or 0):.2f}"
        )
    return artifact


def _opened(config: PretrainConfig) -> Dataset:
    """The datasets, before anything starts. Raises UsageError, also where one is damaged."""
    try:
        return prepare.open_datasets(
            Storage(config.storage.root), config.data.datasets, config.data.cache_gib
        )
    except ArtifactError as error:
        raise UsageError(str(error)) from error


def _note(record: dict[str, Any]) -> str:
    note = f"loss {record['train/loss']:.3f} nats"
    if "transitions_per_s" in record:
        note += f"  {record['transitions_per_s']:,.0f} transitions/s"
    return note


def _id(config: PretrainConfig, dataset: Dataset, gpus: float) -> str:
    given = {
        key: value
        for key in ("unique", "weights", "block")
        if (value := getattr(config.data, key)) is not None
    }
    data = {"datasets": dataset.ids} | given if given else dataset.ids
    said = what(config, _precision(config, gpus)) | {"data": data}
    return fingerprint("worlds", said, VERSIONS["pretrain"], SCHEMA)


def _steps(config: PretrainConfig, dataset: Dataset, codec: Codec) -> tuple[int, Loader]:
    """How many steps, and the loader that they walk."""
    train = config.train
    data = config.data
    loader = Loader(
        dataset,
        codec,
        "train",
        config.model.context,
        train.batch,
        config.seed,
        block=data.block,
        weights=data.weights,
    )
    if train.epochs is not None:
        return max(1, math.ceil(train.epochs * loader.windows_per_epoch / train.batch)), loader
    return train.steps or DEFAULT_STEPS, loader


def _gpus(config: PretrainConfig) -> float:
    """GPUs a worker."""
    if config.train.gpus_per_worker is not None:
        return config.train.gpus_per_worker
    if config.ray.address is not None:
        ray_session.ensure(config.ray)
        have = ray_session.most().get("GPU", 0.0)
    else:
        import torch

        have = float(torch.cuda.device_count())
    return 1.0 if have >= config.train.workers else 0.0


def _precision(config: PretrainConfig, gpus: float) -> str:
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if gpus else "fp32"
