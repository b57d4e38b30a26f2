"""Text environments: observations and actions are texts, and each lists its sensible commands.

Importing the package registers them: `reality.env=mesocosm.envs.text:Chores-v0`, or
`gymnasium.make("mesocosm.envs.text:Chores-v0")`.
"""

import gymnasium

gymnasium.register(
    "Chores-v0", entry_point="mesocosm.envs.text.chores:Chores", max_episode_steps=20
)
gymnasium.register(
    "ChoresEasy-v0",
    entry_point="mesocosm.envs.text.chores:Chores",
    max_episode_steps=20,
    kwargs={"easy": True},
)
gymnasium.register(
    "Company-v0", entry_point="mesocosm.envs.text.company_shell:CompanyShell", max_episode_steps=30
)
