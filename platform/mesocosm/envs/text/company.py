"""Fictional companies: people, files and tables, drawn by seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mesocosm.envs.text.database import Table

NAMES = (
    "Nora Okafor", "Emil Brandt", "Ines Duarte", "Tariq Aziz", "Mila Novak", "Jonas Weber",
    "Priya Nair", "Luca Conti", "Sofia Lind", "Omar Haddad", "Greta Olsen", "Kenji Mori",
    "Ana Pereira", "Felix Huber", "Zoe Laurent", "Ivan Petrov", "Maya Cohen", "Leo Fontaine",
)  # fmt: skip
TEAMS = ("sales", "support", "finance", "purchasing", "legal")
FIRMS = (
    "Harbor Goods", "Lindgren Ltd", "Alto Books", "Prime Bikes", "Tidal Foods", "Nordic Tools",
    "Casa Verde", "Blue Kiosk", "Orchard Inn", "Rapid Print", "Stone Mill", "Polar Optics",
)  # fmt: skip
COMPANIES = ("Brightwell Supplies", "Keller Trading", "Marlow Wholesale", "Oakfield Imports")
CITIES = ("Lisbon", "Porto", "Bergen", "Turin", "Ghent", "Leeds")
ITEMS = ("paper", "lamp", "chair", "desk", "cable", "printer", "folder", "stapler")
STATUSES = ("open", "paid", "shipped")
SETTINGS = {
    "port": ("8080", "8443", "9000"),
    "timeout": ("15", "30", "60"),
    "retries": ("2", "3", "5"),
    "workers": ("4", "8", "16"),
    "region": ("north", "south", "west"),
    "backup_hour": ("1", "3", "5"),
}
PROGRAMS = ("shop", "mail", "billing", "archive")
EVENTS = ("INFO started", "INFO 14 requests", "WARN slow disk", "ERROR lost connection",
          "INFO backup done", "WARN queue is long", "ERROR disk full")  # fmt: skip
TOPICS = ("The printer on the second floor is broken.", "Lunch on Friday is at noon.",
          "The meeting about prices moved to Monday.", "Please hand in travel costs.")  # fmt: skip


@dataclass
class Company:
    """The state in which an episode starts."""

    name: str
    files: dict[str, str]
    tables: dict[str, Table]

    def rows(self, table: str) -> list[dict[str, str | int]]:
        """The rows of a table, as dicts."""
        return [
            dict(zip(self.tables[table].columns, row, strict=True))
            for row in self.tables[table].rows
        ]


def draw_company(rng: random.Random) -> Company:
    """Draw a company: about 14 files in 5 folders, and 3 tables."""
    files: dict[str, str] = {}
    people = rng.sample(NAMES, rng.randint(8, 12))
    teams = sorted(rng.sample(TEAMS, 3))
    for k, team in enumerate(teams):
        lines = [f"{n}, ext {rng.randint(1000, 9999)}, room {rng.randint(10, 99)}"
                 for n in people[k :: len(teams)]]  # fmt: skip
        files[f"/staff/{team}.txt"] = text(lines)
    _add_settings(rng, files)
    day = rng.randint(1, 20)
    for k in range(rng.randint(4, 6)):
        times = sorted(rng.sample(range(6, 22), rng.randint(3, 5)))
        calm = [event for event in EVENTS if "ERROR" not in event]
        events = EVENTS if rng.random() < 0.5 else calm
        log = [f"{hour:02d}:{rng.randint(0, 59):02d} {rng.choice(events)}" for hour in times]
        files[f"/logs/03-{day + k:02d}.log"] = text(log)
    for k, topic in enumerate(rng.sample(TOPICS, 2)):
        files[f"/inbox/memo-{k + 1}.txt"] = text([f"From: {rng.choice(people)}", topic])
    files["/reports/march.txt"] = text(
        [f"{item}: {rng.randint(20, 400)} sold" for item in rng.sample(ITEMS, 3)]
    )
    return Company(rng.choice(COMPANIES), files, _draw_tables(rng))


def _add_settings(rng: random.Random, files: dict[str, str]) -> None:
    """Give each setting to one of three programs, and one of them to a decoy of its name too."""
    programs = rng.sample(PROGRAMS, 3)
    lines: dict[str, list[str]] = {program: [f"[{program}]"] for program in programs}
    keys = list(SETTINGS)
    rng.shuffle(keys)
    for k, key in enumerate(keys):
        lines[programs[k % 3]].append(f"{key} = {rng.choice(SETTINGS[key])}")
    decoy = rng.choice(keys)
    lines[programs[(keys.index(decoy) + 1) % 3]].append(f"old_{decoy} = {SETTINGS[decoy][0]}")
    for program in programs:
        files[f"/config/{program}.ini"] = text(lines[program])


def _draw_tables(rng: random.Random) -> dict[str, Table]:
    firms = rng.sample(FIRMS, rng.randint(6, 8))
    customers = [(k + 1, firm, rng.choice(CITIES)) for k, firm in enumerate(firms)]
    items = rng.sample(ITEMS, rng.randint(4, 6))
    products = [(k + 1, item, rng.randint(3, 60)) for k, item in enumerate(items)]
    orders = [
        (100 + k, rng.randint(1, len(firms)), rng.choice(items), 5 * rng.randint(2, 80),
         rng.choice(STATUSES))
        for k in range(rng.randint(9, 14))
    ]  # fmt: skip
    return {
        "customers": Table({"id": "INTEGER", "name": "TEXT", "city": "TEXT"}, customers),
        "products": Table({"id": "INTEGER", "item": "TEXT", "stock": "INTEGER"}, products),
        "orders": Table(
            {"id": "INTEGER", "customer": "INTEGER", "item": "TEXT", "amount": "INTEGER",
             "status": "TEXT"},
            orders,
        ),
    }  # fmt: skip


def text(lines: Sequence[str]) -> str:
    """The contents of a file."""
    return "".join(f"{line}\n" for line in lines)
