"""The rules of `chores`: a household whose objects are hidden until the agent looks into their
place.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

CONTAINERS = ("cabinet", "drawer", "fridge", "microwave", "safe", "box", "wardrobe")
"""Places that can be closed. They are closed at the start."""
TREATMENTS = {
    "clean": ("clean", ("sink",)),
    "heat": ("hot", ("stove", "microwave")),
    "cool": ("cool", ("fridge",)),
}
"""Verb -> (the state that it gives to an object, the places where it works)."""
VERBS = {state: verb for verb, (state, _) in TREATMENTS.items()}
HEATERS = TREATMENTS["heat"][1]
"""Places that hold nothing at the start."""
TAKE_REWARD = TREAT_REWARD = 0.2
REWARDS = (0.0, 0.2, 0.6, 0.8)
"""All rewards of a step: .2 for the first take of the right object and for its first right
treatment, and the rest of 1 at the end.
"""
DONE = "You have done your task."
NOTHING = "Nothing happens."


@dataclass(frozen=True)
class Variant:
    """A family of households: the words and sizes that tasks are drawn from."""

    surfaces: tuple[str, ...]
    containers: tuple[str, ...]
    objects: tuple[str, ...]
    colors: tuple[str, ...]
    """Adjectives of objects; "" for none."""
    rooms: tuple[str, ...]
    kinds: tuple[str, ...]
    """Kinds of task: "plain", or the state that the object must have at the end."""
    n_places: tuple[int, int]
    """Fewest and most places."""
    n_objects: tuple[int, int]
    """Fewest and most objects."""


FULL = Variant(
    surfaces=("countertop", "table", "shelf", "sink", "stove", "desk", "sofa", "bench"),
    containers=CONTAINERS,
    objects=(
        *("apple", "bread", "mug", "plate", "knife", "egg", "potato", "tomato"),
        *("bowl", "cup", "spoon", "book", "pen", "soap", "towel", "candle"),
    ),
    colors=("red", "blue", "green", "white", "black", "old"),
    rooms=("kitchen", "living room", "bedroom", "workshop", "dining room"),
    kinds=("plain", "clean", "hot", "cool"),
    n_places=(4, 6),
    n_objects=(3, 5),
)
EASY = Variant(
    surfaces=("table", "shelf", "sink", "desk"),
    containers=("cabinet", "fridge"),
    objects=("apple", "mug", "plate", "book", "cup", "egg"),
    colors=("",),
    rooms=("kitchen",),
    kinds=("plain", "clean", "cool"),
    n_places=(3, 4),
    n_objects=(2, 2),
)


@dataclass(frozen=True)
class CommandResult:
    """The result of one command."""

    text: str
    reward: float
    terminated: bool
    valid: bool
    """False if the command is not possible here: nothing happens."""
    revealed: bool
    """True if the text shows contents that no earlier text showed."""


@dataclass
class Household:
    """The state of one episode. `apply` is the whole dynamics."""

    room: str
    places: list[str]
    kind: str
    goal: str
    """The object of the task, such as "red mug"."""
    destination: str
    contents: dict[str, list[str]]
    """The objects in each place, in the order in which a text lists them."""
    opened: set[str] = field(default_factory=set)
    shown: set[str] = field(default_factory=set)
    """Places whose contents are known from earlier texts."""
    at: str | None = None
    carried: str | None = None
    states: dict[str, str] = field(default_factory=dict)
    """The latest treatment of each object."""
    earned: set[str] = field(default_factory=set)

    @property
    def task(self) -> str:
        """The task as the first text puts it."""
        state = "" if self.kind == "plain" else f"{self.kind} "
        return f"put the {state}{self.goal} {preposition(self.destination)} the {self.destination}"

    def first_text(self) -> str:
        """The observation of the reset."""
        return (
            f"You are in the middle of a {self.room}. Around you are {listed(self.places)}."
            f" You carry nothing. Your task is to {self.task}."
        )

    def is_open(self, place: str) -> bool:
        """True if the contents of the place can be seen and reached."""
        return place not in CONTAINERS or place in self.opened

    def reveals(self) -> bool:
        """True if a text now would show contents that no earlier text showed."""
        place = self.at
        hidden = place is not None and self.is_open(place) and place not in self.shown
        return hidden and place not in HEATERS

    def apply(self, command: str) -> CommandResult:
        """Execute one command. Case and repeated spaces do not matter."""
        event, reward, terminated = self._execute(" ".join(command.lower().split()))
        revealed = self.reveals()
        if self.at is not None and self.is_open(self.at):
            self.shown.add(self.at)
        end = f" {DONE}" if terminated else ""
        text = f"{event or NOTHING}{end} {self._surroundings()} {self._hands()}"
        return CommandResult(text, reward, terminated, event is not None, revealed)

    def _execute(self, command: str) -> tuple[str | None, float, bool]:
        """The (event, reward, terminated) of a normalised command; event None if impossible."""
        here, held = self.at, self.carried
        if command.startswith("go to ") and (place := command[6:]) in self.places and place != here:
            self.at = place
            return f"You walk to the {place}.", 0.0, False
        if here is None:
            return None, 0.0, False
        if here in CONTAINERS and command == f"open {here}" and here not in self.opened:
            self.opened.add(here)
            return f"You open the {here}.", 0.0, False
        if here in CONTAINERS and command == f"close {here}" and here in self.opened:
            self.opened.remove(here)
            return f"You close the {here}.", 0.0, False
        if held is None:
            return self._take(command, here)
        if command == f"put {held} {preposition(here)} {here}" and self.is_open(here):
            return self._put(held, here)
        for verb, (state, places) in TREATMENTS.items():
            if command == f"{verb} {held} with {here}" and here in places:
                self.states[held] = state
                right = held == self.goal and state == self.kind
                reward = self._earn("treat", TREAT_REWARD) if right else 0.0
                return f"You {verb} the {held} with the {here}.", reward, False
        return None, 0.0, False

    def _take(self, command: str, here: str) -> tuple[str | None, float, bool]:
        for name in self.contents[here] if self.is_open(here) else ():
            if command == f"take {name} from {here}":
                self.contents[here].remove(name)
                self.carried = name
                reward = self._earn("take", TAKE_REWARD) if name == self.goal else 0.0
                return f"You take the {name} from the {here}.", reward, False
        return None, 0.0, False

    def _put(self, held: str, here: str) -> tuple[str, float, bool]:
        self.contents[here].append(held)
        self.carried = None
        treated = self.kind == "plain" or self.states.get(held) == self.kind
        done = held == self.goal and here == self.destination and treated
        reward = (0.8 if self.kind == "plain" else 0.6) if done else 0.0
        return f"You put the {held} {preposition(here)} the {here}.", reward, done

    def _earn(self, event: str, reward: float) -> float:
        """The reward of an event, once in an episode."""
        if event in self.earned:
            return 0.0
        self.earned.add(event)
        return reward

    def _surroundings(self) -> str:
        place = self.at
        if place is None:
            return "You are in the middle of the room."
        if not self.is_open(place):
            return f"You are at the {place}. The {place} is closed."
        seen = f"the {place} you see {listed(self.contents[place])}."
        if place in CONTAINERS:
            return f"You are at the {place}. The {place} is open. In {seen}"
        return f"You are at the {place}. On {seen}"

    def _hands(self) -> str:
        if self.carried is None:
            return "You carry nothing."
        state = self.states.get(self.carried)
        return f"You carry {article(self.carried)}{f' ({state})' if state else ''}."


def draw(rng: random.Random, variant: Variant) -> Household:
    """Draw a household and a task that can be solved in it."""
    kind = rng.choice(variant.kinds)
    required = [] if kind == "plain" else [rng.choice(appliances(kind, variant))]
    others = [p for p in (*variant.surfaces, *variant.containers) if p not in required]
    places = required + rng.sample(others, rng.randint(*variant.n_places) - len(required))
    rng.shuffle(places)
    nouns = rng.sample(variant.objects, rng.randint(*variant.n_objects))
    names = [f"{rng.choice(variant.colors)} {noun}".strip() for noun in nouns]
    goal = rng.choice(names)
    destination = rng.choice([place for place in places if place not in required])
    contents: dict[str, list[str]] = {place: [] for place in places}
    for name in names:
        free = [place for place in places if place not in HEATERS]
        if name == goal:
            free = [place for place in free if place != destination]
        contents[rng.choice(free)].append(name)
    return Household(rng.choice(variant.rooms), places, kind, goal, destination, contents)


def appliances(kind: str, variant: Variant) -> list[str]:
    """The places of a variant where an object can get the state `kind`."""
    known = (*variant.surfaces, *variant.containers)
    return [place for place in TREATMENTS[VERBS[kind]][1] if place in known]


def preposition(place: str) -> str:
    """The word between an object and the place that holds it."""
    return "in" if place in CONTAINERS else "on"


def article(name: str) -> str:
    """The name with its indefinite article."""
    return f"{'an' if name[:1] in tuple('aeiou') else 'a'} {name}"


def listed(names: list[str]) -> str:
    """The names as texts list them."""
    return ", ".join(map(article, names)) or "nothing"
