"""`make bench-language`: CPU seconds of the language family on one thread: training, generation,
restoring, and transformers' speed with the same weights.

    python benchmarks/bench_language.py [--size 1m] [--seconds 60] [--steps 4000] [--split words]

It logs `chores` with experts of which 30% to 100% of the commands are random, trains a world for
--seconds CPU seconds, and lets it play 64 sessions of ten steps with random commands. Speeds are
tokens per CPU second of one thread; ratios are of the same run. The figures are added to
benchmarks/results/bench_language.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from bench_world import commit

from mesocosm.envs.text.chores import Chores
from mesocosm.envs.text.chores_policies import ChoresExpert
from mesocosm.model import rng
from mesocosm.model.language.hf import save_folder
from mesocosm.model.language.llama import Llama
from mesocosm.model.language.net import TextNet
from mesocosm.model.language.shape import rung_shape
from mesocosm.model.language.stream import Segment, TextEpisode, TokenRows, collate, segments
from mesocosm.model.language.tokenizer import TextTokenizer
from mesocosm.model.language.world import TextWorld
from mesocosm.model.mup import init_, param_groups
from mesocosm.model.spec import PartSpec, Spec

RESULTS = Path(__file__).parent / "results" / "bench_language.json"
SESSIONS, PLAYED, HORIZON, WINDOW = 64, 10, 20, 1024
BATCH_TOKENS = 2048
SPEC = Spec(PartSpec(), PartSpec(), reward_values=(0.0, 0.2, 0.6, 0.8), terminal_rate=0.02)


def collect(steps: int, seed: int, noise: tuple[float, ...]) -> list[TextEpisode]:
    """Episodes of experts, each with a fraction of random commands from `noise`."""
    generator, env, policy = np.random.default_rng(seed), Chores(), ChoresExpert()
    episodes: list[TextEpisode] = []
    while sum(len(episode.actions) for episode in episodes) < steps:
        number = len(episodes)
        observation, _ = env.reset(seed=seed * 1_000_003 + number)
        policy.start(number, generator)
        texts, actions, rewards = [observation], [], []
        fraction, ended = float(generator.choice(noise)), False
        while not ended and len(actions) < HORIZON:
            action = policy(observation, generator)
            if generator.random() < fraction:
                action = policy.random_action(observation, generator)
            observation, reward, ended, _, _ = env.step(action)
            texts.append(observation)
            actions.append(action)
            rewards.append(reward)
        episodes.append(TextEpisode("", texts, actions, rewards, ended, number))
    return episodes


def batches(parts: list[Segment], generator: np.random.Generator) -> list[TokenRows]:
    """Rows of one segment each, of nearly equal lengths: on a CPU this costs less than a mask."""
    lengths = np.array([len(part) for part in parts]) + generator.random(len(parts)) * 40
    groups: list[list[Segment]] = [[]]
    for index in np.argsort(-lengths):
        group = groups[-1]
        if group and (len(group) + 1) * len(group[0]) > BATCH_TOKENS:
            group = []
            groups.append(group)
        group.append(parts[index])
    generator.shuffle(groups)  # type: ignore[arg-type]
    return [collate([[part] for part in group], max(map(len, group))) for group in groups]


def train(net: TextNet, parts: list[Segment], seconds: float, lr: float) -> dict[str, float]:
    """Train for `seconds` of CPU time. The last rows' losses are the training's, not held out."""
    optimizer = torch.optim.AdamW(param_groups(net, lr, 0.02), betas=(0.9, 0.98))
    rates = [group["lr"] for group in optimizer.param_groups]
    generator, tokens, steps, epochs = np.random.default_rng(0), 0, 0, 0
    began = time.process_time()
    while True:
        epochs += 1
        for rows in batches(parts, generator):
            done = (time.process_time() - began) / seconds
            if done >= 1:
                spent = time.process_time() - began
                return {"tokens": tokens, "steps": steps, "epochs": epochs, "seconds": spent}
            factor = min(1.0, (steps + 1) / 50) * (1 - 0.95 * done)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            with torch.autocast("cpu", torch.bfloat16):
                objective = net(rows).objective
            optimizer.zero_grad()
            objective.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            tokens, steps = tokens + int((rows.part >= 0).sum()), steps + 1


def judge(net: TextNet, parts: list[Segment]) -> dict[str, float]:
    """Nats per transition and bits per byte."""
    totals: dict[str, float] = {}
    for rows in batches(parts, np.random.default_rng(0)):
        losses = net.losses(rows)
        figures = {**losses.nats, "transitions": losses.transitions, "bytes": losses.bytes}
        for name, value in figures.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    count = totals.pop("transitions")
    bits = totals["dynamics"] / totals.pop("bytes") / np.log(2)
    return {**{name: value / count for name, value in totals.items()}, "bits_per_byte": float(bits)}


def play(world: TextWorld, episodes: list[TextEpisode]) -> dict[str, float]:
    """Generate, then restore the same sessions and compare what they do next."""
    generator, policy = np.random.default_rng(0), ChoresExpert()
    chosen = [episodes[index % len(episodes)] for index in range(SESSIONS)]
    member = torch.zeros(SESSIONS, dtype=torch.int64)
    starts = [episode.observations[0] for episode in chosen]
    carry = world.begin([""] * SESSIONS, starts, member)
    spent, tokens = 0.0, 0

    def actions(texts: list[str]) -> list[str]:
        commands = []
        for start, text in zip(starts, texts, strict=True):
            policy.start(0, generator)
            policy.random_action(start, generator)
            try:
                commands.append(policy.random_action(text, generator))
            except (ValueError, AttributeError, IndexError):  # a text that no chores has
                commands.append("look")
        return commands

    texts = starts
    for step in range(PLAYED):
        commands, keys = actions(texts), rng.keys(1, torch.arange(SESSIONS), 0, step)
        began = time.process_time()
        carry, out = world.step(carry, commands, keys, disagreement=False)
        spent += time.process_time() - began
        tokens, texts = tokens + int(out.tokens.sum()), out.observation
    began = time.process_time()
    restored = world.restore(carry.context)
    restoring = time.process_time() - began
    commands, keys = actions(texts), rng.keys(1, torch.arange(SESSIONS), 0, PLAYED)
    a, b = (
        world.step(session, commands, keys, disagreement=False)[1] for session in (carry, restored)
    )
    same = a.observation == b.observation and torch.equal(a.surprise, b.surprise)
    return {
        "tokens_per_second": tokens / spent,
        "steps_per_second": SESSIONS * PLAYED / spent,
        "restore_ratio": restoring / spent,
        "bits_equal": float(same),
    }


def decode_speed(network: Llama, batch: int, length: int = 128) -> dict[str, float]:
    """Tokens per CPU second of a raw decoding loop, by us and by transformers."""
    ids = torch.randint(0, network.shape.vocabulary, (batch, length))
    count = torch.ones(batch, dtype=torch.int64)
    cache = network.new_cache(batch, length)
    began = time.process_time()
    for index in range(length):
        states = network.feed(cache, ids[:, index : index + 1], count)
        network.logits(states[:, 0])
    speeds = {"ours": batch * length / (time.process_time() - began)}
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return speeds
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        save_folder(network, Path(folder))
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        other(ids[:, :1])
        past = None
        began = time.process_time()
        for index in range(length):
            out = other(ids[:, index : index + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
        speeds["transformers"] = batch * length / (time.process_time() - began)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1m")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--split", default="words", choices=("words", "phrases"))
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=4e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train_episodes = collect(arguments.steps, 1, (0.3, 0.6, 1.0))
    held_out = collect(1000, 2, (0.3, 0.7, 1.0))
    texts = [t for episode in train_episodes for t in (*episode.observations, *episode.actions)]
    unique = list(dict.fromkeys(texts))
    tokenizer = TextTokenizer.train(unique, arguments.vocabulary, arguments.split)
    parts, valid = (
        [part for episode in log for part in segments(episode, tokenizer, SPEC, WINDOW)]
        for log in (train_episodes, held_out)
    )
    network = Llama(rung_shape(arguments.size, tokenizer.size))
    net = TextNet(network, SPEC)
    init_(net, 0)
    trained = train(net, parts, arguments.seconds, arguments.lr)
    longest = max(len(tokenizer.encode(text)) for text in unique) + 1
    world = TextWorld(net, tokenizer, window=WINDOW, longest=longest, longest_start=longest + 1)
    figures = {
        "commit": commit(),
        "command": " ".join(sys.argv),
        "size": arguments.size,
        "parameters": network.shape.params + network.shape.embeddings,
        "vocabulary": tokenizer.size,
        "split": arguments.split,
        "training_tokens_per_second": trained["tokens"] / trained["seconds"],
        "training": trained,
        "held_out": judge(net, valid),
        "generation": play(world, held_out),
        "decode": {batch: decode_speed(network, batch) for batch in (1, 16, 64)},
    }
    print(json.dumps(figures, indent=1))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[f"{arguments.size} {arguments.split}"] = figures
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
