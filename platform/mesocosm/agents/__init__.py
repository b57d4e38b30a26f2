"""RLlib agents that train inside a world. Start with training.py; rllib.py builds the
algorithm, and settings.py holds the defaults of PPO, SAC and DQN."""
