"""Stop or kill a pretraining after a step, in its worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mesocosm.train import pretrain as driver
from mesocosm.train import worker


def after_put(
    step: int,
    action: Callable[[Any], None],
    patch: pytest.MonkeyPatch,
    train_loop: Callable[[dict[str, Any]], None] = worker.train_loop,
) -> None:
    """Call `action(feed)` in the worker after it reports `step`."""

    def changed(config: dict[str, Any]) -> None:
        from mesocosm.train.driver_channel import Feed

        put = Feed.put

        def put_and_act(self: Feed, record: dict[str, Any]) -> None:
            put(self, record)
            if record.get("step") == step:
                action(self)

        Feed.put = put_and_act  # type: ignore[method-assign]
        train_loop(config)

    patch.setattr(driver, "train_loop", changed)


def stop_after(
    step: int,
    patch: pytest.MonkeyPatch,
    train_loop: Callable[[dict[str, Any]], None] = worker.train_loop,
) -> None:
    """Stop as a driver that is interrupted does."""

    def stop(feed: Any) -> None:
        feed.stop("a test")
        feed.flush()

    after_put(step, stop, patch, train_loop)
