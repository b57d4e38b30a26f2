"""The job `tokenize`: frames of datasets -> a frozen tokenizer, and the codes of the datasets.

A dictionary of patches is fitted to the training split without a gradient step, fsq is trained
(`kind`). Each shard's counts and codes are stored as they are made (`runs/tokens/ID`), so that a
killed job continues after them when it is run again. With `tokenizer`, new codes are appended to an
earlier one's, whose codes keep their meaning: worlds of it stay valid.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mesocosm import checks
from mesocosm.config import JobConfig, identity
from mesocosm.data.tokens.counting import MEMORY, MOST_CODES
from mesocosm.data.tokens.making import (
    DICTIONARY,
    FSQ,
    KINDS_OR_AUTO,
    FitSettings,
    StoredParts,
    encode,
    fit,
    spread,
)
from mesocosm.data.tokens.reading import PAGE, REPORT, Tokenizers
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.leaf import Leaf
from mesocosm.errors import UsageError
from mesocosm.evaluate.report import tokenizer_page
from mesocosm.job import Job, Plan
from mesocosm.model.tokenizer.frames import FrameTokenizer
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.store.cache import open_partial

Array = NDArray[Any]
PATCH = 8
SHOWN = 8
"""Frames of the page."""


@dataclass
class TokenizeData:
    datasets: list[str] = field(default_factory=list)
    """Dataset ids (or unique prefixes), whose observations have images."""


@dataclass
class TokenizeConfig(JobConfig):
    data: TokenizeData = field(default_factory=TokenizeData)
    kind: str = "auto"
    """`dictionary`: a table of patches, exact for sprites, tiles and screens, without training.
    `fsq`: two small networks of patches, which are trained. `auto`: for each image a dictionary
    where it has a code for 99.9% of the patches, else fsq.
    """
    steps: int = 4000
    """Training steps of fsq, of 256 patches each."""
    patch: int | None = None
    """Side of a patch in pixels. It must divide the height and width of every image. Defaults to
    that of `tokenizer`, or to 8.
    """
    codes: int = 4096
    """The most codes of an image's dictionary: the most frequent patches of the training split
    have one. (A position of fsq has 4 digits of 8 levels.)
    """
    tokenizer: str | None = None
    """A tokenizer of dictionaries to grow: its codes come first. Its worlds stay valid."""


@dataclass(frozen=True, kw_only=True)
class Tokenization(Plan[TokenizeConfig]):
    leaves: list[Leaf]
    patch: int
    frames: int
    old: Tokenizers | None
    old_name: str | None


class Tokenize(Job[TokenizeConfig, Tokenization]):
    """Fit a tokenizer and encode the datasets, or find the tokenizer of the same config.

    Raises:
        UsageError: A dataset or tokenizer is unknown, there is no image, the patch does not fit,
            the dictionary is too large, a learned tokenizer is to grow, or all frames are equal.
    """

    name, kind, config = "tokenize", "tokenizers", TokenizeConfig

    def resolve(self, config: TokenizeConfig, storage: Storage) -> Tokenization:
        checks.one_of(config, KINDS_OR_AUTO, "kind")
        checks.at_least(config, 1, "steps")
        names = config.data.datasets
        if not names:
            raise UsageError("data.datasets must name a dataset, got []; try data.datasets=[ID]")
        dataset = Dataset([open_partial(storage, "datasets", name) for name in names])
        leaves = dataset.observation_codec.image_leaves
        if not leaves:
            raise UsageError(
                f"data.datasets must have an image in their observation, got"
                f" {dataset.observation_space}; docs/images.md says which spaces are images"
            )
        old, old_name = None, None
        if config.tokenizer is not None:
            artifact = storage.artifact("tokenizers", config.tokenizer)
            old, old_name = Tokenizers.load(artifact.path), artifact.name
            old.check(leaves, f"tokenizer={old_name}")
            if config.kind == FSQ or any(one.kind != DICTIONARY for one in old.each):
                kinds = ", ".join(one.kind for one in old.each)
                raise UsageError(
                    f"tokenizer={config.tokenizer} must be of dictionaries to grow, got {kinds} and"
                    f" kind={config.kind}: a learned tokenizer that is trained again gives other"
                    " codes; make a new one without tokenizer"
                )
        patch = _patch(config, leaves, old)
        _check_codes(config, leaves, patch, old)
        facts = identity(config, without=["data", "tokenizer"]) | {"patch": patch}
        inputs = {"datasets": dataset.ids}
        if old_name is not None:
            inputs["tokenizers"] = [old_name.partition("/")[2]]
        return Tokenization(
            config=config,
            inputs=inputs,
            facts=identity(config) | {"patch": patch},
            id=self.hash("tokenize", facts, inputs),
            leaves=leaves,
            patch=patch,
            frames=dataset.transitions + len(dataset.table),
            old=old,
            old_name=old_name,
        )

    def summary(self, plan: Tokenization) -> dict[str, Any]:
        config, images = plan.config, list[dict[str, Any]]()
        for leaf in plan.leaves:
            height, width, channels = leaf.shape
            count = (height // plan.patch) * (width // plan.patch)
            images.append(
                {
                    "image": leaf.name,
                    "pixels": f"{height} x {width} x {channels}",
                    "codes a frame": count,
                    "bytes a frame": f"{count * (2 if config.kind == DICTIONARY else 4)} at most",
                }
            )
        return {
            "tokenizer": f"tokenizers/{plan.id}",
            "kind": config.kind,
            "from": ", ".join(plan.inputs["datasets"]),
            "grows": plan.old_name or "none",
            "frames": plan.frames,
            "patch": f"{plan.patch} x {plan.patch} pixels",
            "codes": f"at most {config.codes} of a dictionary",
            "steps": f"{config.steps} of fsq" if config.kind != DICTIONARY else "none",
            "images": images,
            "price": "nothing: no real step is taken",
        }

    def make(self, plan: Tokenization, run: Run) -> Artifact:
        ids = plan.inputs["datasets"]
        dataset = Dataset([open_partial(run.storage, "datasets", id) for id in ids])
        parts = StoredParts(run.storage, plan.id)
        config = plan.config
        settings = FitSettings(config.kind, plan.patch, config.codes, config.steps, config.seed)
        fitted = fit(plan.leaves, settings, plan.old, dataset, parts, run)
        report = encode(dataset, fitted, parts, run)
        run.log(_metrics(report["images"]))
        pictures = [
            _pictures(dataset, name, one)
            for name, one in zip(dataset.image_names, fitted.each, strict=True)
        ]

        def fill(folder: Path) -> None:
            fitted.save(folder)
            (folder / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
            (folder / PAGE).write_text(tokenizer_page.render(report, pictures))
            for place, name in parts.codes(dataset):
                path = folder / "codes" / place / f"{name}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(parts.read(f"{parts.part(place, name)}.npy"))

        artifact = self.commit(plan, run, fill)
        parts.remove()
        return artifact

    def report(self, artifact: Artifact, plan: Tokenization, run: Run, *, made: bool) -> None:
        report = json.loads((artifact.path / REPORT).read_text())
        run.record(tokenizer=report)
        run.artifact(artifact.path / PAGE)
        for line in map(tokenizer_page.sentence, report["images"]):
            run.say(f"{artifact.name}: {line}")
        if not made:
            run.say(f"found {artifact.name}; nothing was made")
        run.say(f"page: {artifact.path / PAGE}")


def _patch(config: TokenizeConfig, leaves: list[Leaf], old: Tokenizers | None) -> int:
    """The side of a patch. Raises UsageError where it does not fit an image."""
    before = None if old is None else getattr(old.each[0], "patch", None)
    patch = config.patch if config.patch is not None else (before or PATCH)
    if before is not None and patch != before:
        raise UsageError(
            f"patch must be {before}, as in tokenizer={config.tokenizer}, got {patch}; leave it out"
        )
    for leaf in leaves:
        height, width, _ = leaf.shape
        if patch < 1 or height % patch or width % patch:
            fitting = [p for p in range(1, 65) if height % p == 0 and width % p == 0]
            raise UsageError(
                f"patch must divide the {height} x {width} pixels of {leaf.name}, got {patch}; try"
                f" one of {', '.join(map(str, fitting))}"
            )
    return patch


def _check_codes(
    config: TokenizeConfig, leaves: list[Leaf], patch: int, old: Tokenizers | None
) -> None:
    """Raise UsageError where the dictionary would be too small or too large."""
    if not 2 <= config.codes <= MOST_CODES:
        raise UsageError(f"codes must be in [2, {MOST_CODES}], got {config.codes}")
    for leaf in leaves:
        bytes_each = patch * patch * leaf.shape[2]
        if config.codes * bytes_each > MEMORY:
            raise UsageError(
                f"codes={config.codes} patches of {patch} x {patch} pixels of {leaf.name} need"
                f" {config.codes * bytes_each / 2**20:.0f} MiB of memory, more than the"
                f" {MEMORY / 2**20:.0f} MiB of a dictionary; lower codes to"
                f" {MEMORY // bytes_each}, or the patch"
            )
    for name, one in zip(old.names, old.each, strict=True) if old is not None else ():
        if max(one.sizes) > config.codes:
            raise UsageError(
                f"codes must be >= {max(one.sizes)}, those of {name} in"
                f" tokenizer={config.tokenizer}, which keep their meaning, got {config.codes}"
            )


def _pictures(dataset: Dataset, image: str, one: FrameTokenizer) -> tuple[Array, Array]:
    """Frames for the page, and their reconstructions."""
    frames = spread(dataset, image, SHOWN)
    return frames, one.decode(one.encode(frames))


def _metrics(images: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of the held-out split, or of training where nothing is held out; of several
    images, by their names.
    """
    metrics: dict[str, float] = {}
    for image in images:
        split = "valid" if image["valid"]["frames"] else "train"
        prefix = "tokenizer" if len(images) == 1 else f"tokenizer/{image['name']}"
        for name, value in image[split].items():
            if value is not None:
                metrics[f"{prefix}/{name}"] = value
    return metrics


JOB = Tokenize()
