"""Train a language model for a few GRPO steps in a served text world, with TRL.

    mesocosm serve world=ID http=8000
    export MESOCOSM_OPENENV_TOKEN=$(cat ~/.mesocosm/world_token)
    python examples/grpo.py openenv:http://127.0.0.1:8000 --model SmolLM2-135M --steps 3

The model reads the texts and writes one command a turn, each on a line. The environment is any that
`reality.env` may name and whose observations and actions are texts: a world to train in, or reality
to compare. TRL asks for whole rollouts and trains on the model's tokens alone (`env_mask`).

It needs `pip install -e ".[trl]"`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import make_env

TASK = "Each line after > is a command, and the text below it tells what happens.\n\n"
PROMPT = "\n> "


@dataclass
class Rollout:
    """One episode of one environment, as the model reads it."""

    env: gymnasium.Env[str, str]
    tokens: list[int]
    """All tokens, the prompt's first"""
    prompt: int
    """Tokens of the prompt"""
    mask: list[int] = field(default_factory=list)
    """1 for each later token that the model wrote"""
    total: float = 0.0
    """The sum of the rewards"""
    over: bool = False


class Rollouts:
    """Plays episodes with the model that is trained; `rollout_func` of `GRPOTrainer`.

    Args:
        name: The environment, as `reality.env`.
        turns: Commands of a rollout, at most.
        words: Tokens of a command, at most.
    """

    def __init__(self, name: str, turns: int, words: int):
        self.name, self.turns, self.words = name, turns, words
        self.seeds: dict[str, int] = {}
        """The seed of each prompt's episode"""
        self._envs: list[gymnasium.Env[str, str]] = []

    def dataset(self, count: int) -> Dataset:
        """A dataset of the prompts of `count` episodes."""
        env = self._env(0)
        for seed in range(count):
            text, _ = env.reset(seed=seed)
            self.seeds[f"{TASK}{text}{PROMPT}"] = seed
        return Dataset.from_list([{"prompt": prompt} for prompt in self.seeds])

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """Play one episode for each prompt, all of them turn by turn."""
        tokenizer = trainer.processing_class
        rollouts = []
        for number, prompt in enumerate(prompts):
            env, tokens = self._env(number), tokenizer(prompt)["input_ids"]
            env.reset(seed=self.seeds[prompt])
            rollouts.append(Rollout(env, list(tokens), len(tokens)))
        model = trainer.accelerator.unwrap_model(trainer.model)
        for _ in range(self.turns):
            live = [rollout for rollout in rollouts if not rollout.over]
            for rollout, command in zip(live, self._commands(model, tokenizer, live), strict=True):
                self._step(rollout, command, tokenizer)
        return {
            "prompt_ids": [rollout.tokens[: rollout.prompt] for rollout in rollouts],
            "completion_ids": [rollout.tokens[rollout.prompt :] for rollout in rollouts],
            "env_mask": [rollout.mask for rollout in rollouts],
            "logprobs": None,
            "total": [rollout.total for rollout in rollouts],
        }

    def _commands(self, model: Any, tokenizer: Any, rollouts: list[Rollout]) -> list[list[int]]:
        """The tokens of the next command of each rollout, up to the end of its line."""
        if not rollouts:
            return []
        lengths = torch.tensor([len(rollout.tokens) for rollout in rollouts])
        longest = int(lengths.max())
        ids = torch.full((len(rollouts), longest), tokenizer.pad_token_id)
        for row, rollout in enumerate(rollouts):
            ids[row, longest - len(rollout.tokens) :] = torch.tensor(rollout.tokens)
        mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
        options = {"do_sample": True, "max_new_tokens": self.words, "stop_strings": ["\n"]}
        with torch.no_grad():
            ids, mask = ids.to(model.device), mask.to(model.device)
            drawn = model.generate(ids, attention_mask=mask, tokenizer=tokenizer, **options).cpu()
        texts = tokenizer.batch_decode(drawn[:, longest:], skip_special_tokens=True)
        lines = [text.partition("\n")[0].strip() or "look" for text in texts]
        return [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]

    def _step(self, rollout: Rollout, command: list[int], tokenizer: Any) -> None:
        text, reward, terminated, truncated, _ = rollout.env.step(tokenizer.decode(command))
        answer = tokenizer(f"\n{text}{PROMPT}", add_special_tokens=False)["input_ids"]
        rollout.tokens += [*command, *answer]
        rollout.mask += [1] * len(command) + [0] * len(answer)
        rollout.total += float(reward)
        rollout.over = terminated or truncated

    def _env(self, number: int) -> gymnasium.Env[str, str]:
        """The environment of a rollout's number; each is used again."""
        while len(self._envs) <= number:
            self._envs.append(make_env(RealityConfig(env=self.name)))
        return self._envs[number]

    def close(self) -> None:
        """End all sessions."""
        for env in self._envs:
            env.close()


def total(completions: list[Any], total: list[float], **_: Any) -> list[float]:
    """The reward of each rollout: the environment's own."""
    return total


def train(
    name: str, model: str, steps: int, episodes: int, group: int, turns: int, out: str
) -> Any:
    """Train and return TRL's trainer.

    Args:
        name: The environment, as `reality.env`.
        model: A folder with a causal language model, or its name on a hub.
        steps: GRPO steps, each of one group of rollouts.
        episodes: Different first texts.
        group: Rollouts of one first text, whose rewards are compared.
        turns: Commands of a rollout, at most.
        out: Folder of the trainer's files.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rollouts = Rollouts(name, turns, words=12)
    config = GRPOConfig(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=group,
        num_generations=group,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    )
    try:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            reward_funcs=total,
            args=config,
            train_dataset=rollouts.dataset(episodes),
            processing_class=tokenizer,
            rollout_func=rollouts,
        )
        trainer.train()
    finally:
        rollouts.close()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO in a served text world")
    parser.add_argument("env", help="as reality.env, such as openenv:http://127.0.0.1:8000")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--out", default="grpo")
    arguments = parser.parse_args()
    names = ("env", "model", "steps", "episodes", "group", "turns", "out")
    train(*(getattr(arguments, name) for name in names))


if __name__ == "__main__":
    main()
