"""`make bench-text-envs`: the sizes and speeds of the text environments, and what experts earn.

    python benchmarks/bench_text_envs.py [--episodes N] [--tokenizer FILE]

Each row is an environment and a share of random commands (`random_action` of the expert), over
episodes with the seeds 0 to N-1. Characters and commands are means and maxima over all texts; the
time is the process's CPU time of a step of environment and expert. FILE is a `tokenizer.json`: its
tokens are counted too.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import gymnasium
import numpy as np

from mesocosm.envs.text.chores_policies import ChoresExpert
from mesocosm.envs.text.company_policies import CompanyExpert

EXPERTS = {"Chores-v0": ChoresExpert, "ChoresEasy-v0": ChoresExpert, "Company-v0": CompanyExpert}
NOISES = (0.0, 0.3, 0.7, 1.0)
COLUMNS = ("environment", "noise", "return", "success", "steps", "characters", "commands", "ms")


def row(id: str, noise: float, episodes: int, tokenizer: Any) -> list[str]:
    """The measurements of one environment and noise."""
    env, expert = gymnasium.make(f"mesocosm.envs.text:{id}"), EXPERTS[id]()
    texts, commands, returns, successes = list[str](), list[int](), list[float](), 0
    began = time.process_time()
    for seed in range(episodes):
        rng = np.random.default_rng(seed)
        expert.start(seed, rng)
        text, info = env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            texts.append(text)
            commands.append(len(info["admissible_commands"]))
            act = expert.random_action if rng.random() < noise else expert
            text, reward, terminated, truncated, info = env.step(act(text, rng))
            total, over = total + float(reward), terminated or truncated
        texts.append(text)
        returns.append(total)
        successes += info["success"]
    milliseconds = 1000 * (time.process_time() - began) / len(commands)
    cells = [id, f"{noise:g}", f"{np.mean(returns):.2f}", f"{successes / episodes:.1%}"]
    cells += [f"{len(commands) / episodes:.1f}", spread([len(text) for text in texts])]
    cells += [spread(commands), f"{milliseconds:.2f}"]
    if tokenizer is not None:
        cells.append(spread([len(tokenizer.encode(text).ids) for text in texts]))
    return cells


def spread(values: list[int]) -> str:
    """The mean of the values, and the lowest and highest."""
    return f"{np.mean(values):.1f} ({min(values)} to {max(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--tokenizer", help="a tokenizer.json, to count tokens")
    options = parser.parse_args()
    tokenizer = None
    if options.tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(options.tokenizer)
    columns = [*COLUMNS, *(["tokens"] if tokenizer else [])]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for id in EXPERTS:
        for noise in NOISES:
            print("| " + " | ".join(row(id, noise, options.episodes, tokenizer)) + " |", flush=True)


if __name__ == "__main__":
    main()
