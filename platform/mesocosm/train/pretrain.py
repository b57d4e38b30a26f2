"""Train a world from a config, by DeepSpeed under Ray Train: the driver's side.

`Pretrain.make` trains the world (`worker.train_loop` on every rank) and exports it. Training state
lies under `runs/checkpoints/<world id>`, so that the same command resumes.
"""

from __future__ import annotations

import json
import math
import threading
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mesocosm.cluster import ray_session
from mesocosm.data.analysis.evidence import evidence
from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.job import Job, Plan, Resources
from mesocosm.model import counts
from mesocosm.model.language.pretrained import pretrained_identity
from mesocosm.model.language.world import TextWorld
from mesocosm.model.world import World
from mesocosm.runs import tracking
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.train import checkpoint, engine, known, prepare
from mesocosm.train.checkpoint import Checkpoint
from mesocosm.train.config import DEFAULT_STEPS, PretrainConfig, world_identity
from mesocosm.train.driver_channel import Feed
from mesocosm.train.export import (
    TerminationCheck,
    calibrate,
    check_termination,
    load_trained,
    widen,
)
from mesocosm.train.prepare import AnyCodec, AnyLoader
from mesocosm.train.text_export import calibrate_text, check_text, load_trained_text
from mesocosm.train.texts import TextCorpus
from mesocosm.train.worker import FLOPS, TrainWork, train_loop

POLL_S, POLL_REMOTE_S = 0.2, 2.0
"""Seconds between reads of the feed; on a remote root each is a request that is paid for."""
STARTS = 7
"""Further attempts to start the workers, of two minutes each (`cluster.ensure`). Ray Train itself
would try for ever if nodes have left.
"""


@dataclass(frozen=True, kw_only=True)
class Pretraining(Plan[PretrainConfig]):
    """A config with its datasets open, and `auto` and null replaced by what they stand for."""

    dataset: Dataset
    functions: known.Functions

    @property
    def gpus(self) -> float:
        """GPUs of each worker."""
        return self.config.train.gpus_per_worker or 0.0

    def loader(self, codec: AnyCodec) -> AnyLoader:
        """The loader of the training split; the codec is fitted on the whole dataset."""
        c = self.config
        dataset = prepare.narrowed(self.dataset, c.data.unique, c.seed)
        return prepare.make_loader(dataset, codec, "train", c.model, c.train.batch, c.seed, c.data)

    def steps(self, loader: AnyLoader) -> int:
        train = self.config.train
        if train.epochs is not None:
            return max(1, math.ceil(train.epochs * loader.windows_per_epoch / train.batch))
        return train.steps or DEFAULT_STEPS


class Pretrain(Job[PretrainConfig, Pretraining]):
    """Pretrain, or find, the world that a config describes."""

    name, kind, config = "pretrain", "worlds", PretrainConfig

    def resolve(self, config: PretrainConfig, storage: Storage) -> Pretraining:
        """Open the datasets and choose the device and the precision."""
        config.validate()
        opened = prepare.open_data(storage, config.data, config.model)
        dataset, data, train = opened.dataset, opened.config, config.train
        gpus, precision = train.gpus_per_worker, train.precision
        if gpus is None:
            available: float = torch.cuda.device_count()
            if config.ray.address is not None:
                ray_session.ensure(config.ray)
                available = ray_session.most().get("GPU", 0.0)
            gpus = 1.0 if available >= train.workers else 0.0
        if precision == "auto":
            precision = "bf16" if gpus else "fp32"
        train = replace(train, gpus_per_worker=gpus, precision=precision)
        config = replace(config, data=data, train=train)
        keys = ("unique", "weights", "block", "tokenizer")
        order = {key: getattr(data, key) for key in keys}
        order = {key: value for key, value in order.items() if value is not None}
        functions = known.load(config.known)
        known.check_spaces(functions, dataset.observation_space, dataset.action_space)
        facts, ids = world_identity(config), dataset.ids
        if config.model.pretrained is not None:  # independent of its folder
            facts["model"]["pretrained"] = pretrained_identity(config.model.pretrained)
        if functions:
            facts["known"] = {part: function.identity for part, function in functions.items()}
        return Pretraining(
            config=config,
            inputs=opened.inputs,
            facts=facts,
            id=self.hash(facts | {"data": {"datasets": ids} | order if order else ids}),
            dataset=dataset,
            functions=functions,
        )

    def summary(self, plan: Pretraining) -> dict[str, Any]:
        warnings = _warnings(plan)
        codec = prepare.fit_codec(plan.dataset, plan.config.model)
        loader = plan.loader(codec)
        steps, model, train = plan.steps(loader), plan.config.model, plan.config.train
        sizes = counts.params(codec.spec, model)
        memory = engine.least_gib(sizes.total, train, train.workers, on_gpu=plan.gpus > 0)
        return {
            "world": f"worlds/{plan.id}",
            "datasets": ", ".join(plan.dataset.ids),
            "params": sizes.n,
            "total_params": sizes.total,
            "steps": steps,
            "transitions": loader.transitions_seen(steps),
            "unique": loader.transitions_per_epoch,
            "epochs": round(steps * train.batch / loader.windows_per_epoch, 2),
            "flops": steps * prepare.step_flops(codec.spec, model, train),
            "memory_gib": round(memory, 2),
        } | ({"warnings": warnings} if warnings else {})

    def resources(self, plan: Pretraining) -> Resources:
        workers = plan.config.train.workers
        return {f"train.workers={workers}": (workers, workers * plan.gpus)}

    def make(self, plan: Pretraining, run: Run) -> Artifact:
        """Train the world, from its last checkpoint if there is one, and export it."""
        config, storage, id = plan.config, run.storage, plan.id
        folder, train = checkpoint.folder_of(id), config.train
        if config.force:
            storage.remove(folder)
        last = checkpoint.latest(storage, id)
        if last is not None and not last[1].done and last[1].zero_stage != engine.stage(train):
            step, saved = last[1].step, last[1].zero_stage
            text = f"train.zero_stage must be {saved} to resume from step {step}"
            raise UsageError(f"{text}, got {train.zero_stage}; {checkpoint.AGAIN}")
        for warning in _warnings(plan):
            run.say(f"warning: {warning}")
        codec = prepare.fitted_codec(storage, folder, plan.dataset, config.model)
        loader = plan.loader(codec)
        steps = plan.steps(loader)
        if last is None or not last[1].done:
            ray_session.ensure(config.ray)
            key, gpus = f"train.workers={train.workers}", train.workers * plan.gpus
            ray_session.preflight(key=key, cpus=train.workers, gpus=gpus)
            if last is not None:
                run.say(f"resuming from step {last[1].step} of {steps}")
            data = replace(config.data, datasets=plan.dataset.ids)
            work = TrainWork(id, storage.root, data, config.model, train, steps, config.seed)
            _train(work, config, run, loader.dataset, codec)
            last = checkpoint.latest(storage, id)
        if last is None or not last[1].done:
            text = f"training of worlds/{id} ended before step {steps}"
            raise MesocosmError(f"{text}; run the same command again to resume")
        artifact = self._export(plan, run, codec, loader, last)
        tracking.register_world(run, artifact)
        storage.remove(folder)
        return artifact

    def _export(
        self, plan: Pretraining, run: Run, codec: AnyCodec, loader: AnyLoader, last: Checkpoint
    ) -> Artifact:
        """Turn the last checkpoint into the world artifact."""
        import ray.train

        config, dataset, storage = plan.config, loader.dataset, run.storage
        path, progress = last
        filesystem, prefix = storage.arrow()
        with ray.train.Checkpoint(f"{prefix}/{path}", filesystem).as_directory() as local:
            checkpoint.verify(Path(local))
            weights = Path(local) / checkpoint.MODEL
            made = (
                _text_world(plan, codec, dataset, weights)
                if isinstance(codec, TextCorpus)
                else _window_world(plan, storage, codec, dataset, weights)
            )
        termination = made.termination
        shown = evidence(dataset, seed=config.seed)
        unidentified = shown.unidentified()

        chosen = (row for row in progress.validations if row["step"] == progress.chosen_step)
        metrics = dict(next(chosen, {}))
        metrics.pop("step", None)
        metrics |= {"chosen_step": progress.chosen_step} | progress.measured | made.metrics
        for name in ("recall", "precision"):
            if (value := getattr(termination, name)) is not None:
                metrics[f"termination_{name}"] = value
        sizes, steps = counts.params(codec.spec, config.model), progress.steps
        seen, unique = loader.transitions_seen(steps), loader.transitions_per_epoch
        verdict = termination.verdict
        if "terminated" in plan.functions:  # the learned one is not used
            verdict = f"not applicable: {plan.functions['terminated'].name} is known"
        checks = {"termination": verdict, "actions": unidentified or "passed"}
        counted = {"params": sizes.n, **asdict(sizes), "data": seen, "unique": unique}
        counted |= {
            "flops": steps * prepare.step_flops(codec.spec, config.model, config.train),
            "epochs": seen / unique,
            "steps": steps,
        }
        if steps > progress.chosen_step:
            step = progress.chosen_step
            run.say(f"kept the weights of step {step}, which predict held-out episodes best")
        artifact = self.commit(
            plan,
            run,
            made.world.save,
            codec=codec.id,
            metrics=metrics,
            checks=checks,
            evidence=shown.to_json(),
            counts=counted,
            seconds=progress.seconds,
        )
        run.log(metrics, steps)
        run.record(metrics=metrics, checks=checks)
        if unidentified is not None:
            run.say(f"warning: {unidentified}")
        if verdict.startswith("failed"):
            run.say(f"warning: termination check {verdict}")
        elif termination.recall is not None:
            recall, precision = termination.recall, termination.precision or 0.0
            text = f"recall {recall:.2f}, precision {precision:.2f}"
            run.say(f"termination ({termination.measured_on}): {text}")
        return artifact


@dataclass(frozen=True)
class _Made:
    """A world that is ready to be stored."""

    world: World | TextWorld
    termination: TerminationCheck
    metrics: dict[str, float]


def _window_world(
    plan: Pretraining, storage: Storage, codec: Codec, dataset: Dataset, weights: Path
) -> _Made:
    config = plan.config
    base_path = f"{checkpoint.folder_of(plan.id)}/{prepare.BASE}"
    base = prepare.read_base(storage, base_path, codec.spec, config.model)
    assert base is not None, "a finished training has its base"
    world = load_trained(weights, base, codec, config.model)
    if plan.functions:
        functions = plan.functions
        world.known = codec.known(functions.get("reward"), functions.get("terminated"))
    widen(world, dataset, codec, config.data.block)
    calibrate(world, dataset, codec)
    return _Made(world, check_termination(world, dataset, codec, config.seed), base.metrics)


def _warnings(plan: Pretraining) -> list[str]:
    """Sentences for the user to read before the training."""
    warnings = list(known.check_data(plan.functions, plan.dataset))
    here = plan.config.ray.address is None and not plan.gpus
    if here and plan.config.train.precision == "bf16" and not engine.cpu_has_bf16():
        warnings.append(
            "train.precision=bf16 is much slower than fp32 on this machine's CPU, which has no bf16"
            " instructions; use train.precision=fp32"
        )
    return warnings


def _text_world(plan: Pretraining, codec: TextCorpus, dataset: Dataset, weights: Path) -> _Made:
    world = load_trained_text(weights, codec, plan.config.model)
    calibrate_text(world, dataset, codec, plan.config.model)
    check = check_text(world, dataset, codec, plan.config.model)
    return _Made(world, check.termination, check.metrics)


def _train(
    work: TrainWork, config: PretrainConfig, run: Run, dataset: Dataset, codec: AnyCodec
) -> None:
    """Train on the cluster and log rank 0's records; fit the base while the workers start."""
    from mesocosm.train.ray_train import make_trainer  # imports Ray Train

    storage, folder = run.storage, checkpoint.folder_of(work.id)
    base_path = f"{folder}/{prepare.BASE}"
    feed = Feed(storage, folder)
    feed.clear()
    private = config.ray.address is None
    trainer = make_trainer(train_loop, work, storage, private=private, start_attempts=STARTS)
    errors: list[BaseException] = []
    # An event, because an interrupted Thread.join takes the thread for ended (CPython 3.11).
    ended = threading.Event()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    failure: str | None = None
    title = f"pretrain {work.model.family} {work.model.size}"
    with run.progress(title, total=work.steps) as update:
        try:
            thread.start()
            flops = prepare.step_flops(codec.spec, work.model, work.train)
            storage.write(f"{folder}/{FLOPS}", json.dumps(flops).encode())
            if isinstance(codec, Codec):
                settings = work.model, work.seed, work.data
                first = partial(update, 0)
                prepare.fit_base(storage, base_path, dataset, codec, *settings, first)
            alive = True
            while alive and failure is None:
                alive = not ended.wait(POLL_REMOTE_S if storage.remote else POLL_S)
                for record in feed.take():
                    failure = record.get("failed", failure)
                    if "step" in record:
                        step = record.pop("step")
                        run.log(record, step)
                        note = f"loss {record['train/loss']:.3f} nats"
                        if "tokens_per_s" in record:
                            note += f"  {record['tokens_per_s']:,.0f} tokens/s"
                        elif "transitions_per_s" in record:
                            note += f"  {record['transitions_per_s']:,.0f} transitions/s"
                        update(step, note)
        except BaseException:
            feed.stop("the driver was interrupted")
            raise
        finally:
            if thread.ident is not None:  # the workers save a checkpoint before they end
                ended.wait(config.stop.grace_s)
    if failure is not None:
        raise MesocosmError(failure)
    if errors:
        _raise(errors[0], work)


def _raise(error: BaseException, work: TrainWork) -> None:
    """Raise an error of Ray Train as a MesocosmError."""
    from ray.exceptions import RayError
    from ray.train.v2.api.exceptions import ControllerError

    if isinstance(error, RayError):
        text = f"the process that controls pretraining was lost ({type(error).__name__})"
        fix = "run the same command again to resume from its last checkpoint"
        raise MesocosmError(f"{text}; {fix}") from error
    if isinstance(error, ControllerError):
        workers = f"train.workers={work.train.workers} of pretraining"
        ray_session.stuck(f"{workers} were not to be started in {STARTS + 1} attempts")
    last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    most = work.train.max_failures
    text = f"pretraining's workers failed more than train.max_failures={most} times: {last[0]}"
    raise MesocosmError(f"{text}; run again to resume") from error


JOB = Pretrain()
