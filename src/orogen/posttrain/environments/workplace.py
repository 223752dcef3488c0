"""A small workplace: tools over a database with state, and tasks that are done when the database is as it should be.

The reward is 1 if, at the end, the database equals the one that the reference calls leave, as in the Workplace
environment of Nemotron 3 Nano (report, section 3.2); otherwise 0, whatever was said. Calls that fail change nothing,
and their errors go back to the model as the tool's output.
"""

import copy
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.interface import Example, Said, Turn, asked

FIRST = ("Ada", "Bo", "Chen", "Dana", "Eli", "Fatima", "Goran", "Hana")
TEAMS, DAYS = ("sales", "research", "support"), ("monday", "tuesday", "wednesday", "thursday", "friday")
HOURS = range(9, 17)
SUBJECTS = ("budget", "launch", "hiring", "audit", "roadmap", "offsite")
STATES = ("open", "in_progress", "done")
Database = dict[str, Any]


class RefusedError(ValueError):
    """A call that cannot be carried out; the message goes to the model."""


def database(rng: random.Random) -> Database:
    """People, their meetings, tickets and mails."""
    people = {
        f"p{n}": {"name": name, "team": rng.choice(TEAMS), "email": f"{name.lower()}@example.com"}
        for n, name in enumerate(rng.sample(FIRST, k=6))
    }
    meetings = {
        f"m{n}": {"title": rng.choice(SUBJECTS), "person": rng.choice(sorted(people)), "day": day,
                  "hour": rng.choice(HOURS)}
        for n, day in enumerate(rng.sample(DAYS, k=4))
    }  # fmt: skip
    tickets = {
        f"t{n}": {"title": title, "state": rng.choice(STATES[:2]), "assignee": rng.choice(sorted(people))}
        for n, title in enumerate(rng.sample(SUBJECTS, k=4))
    }
    return {"people": people, "meetings": meetings, "tickets": tickets, "mails": []}


def _row(db: Database, table: str, key: str) -> dict[str, Any]:
    if key not in db[table]:
        raise RefusedError(f"{table} has no {key!r}")
    return db[table][key]


def _choice(value: Any, choices: Any, name: str) -> Any:
    if value not in choices:
        raise RefusedError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}")
    return value


def _new(db: Database, table: str, letter: str, row: dict[str, Any]) -> dict[str, Any]:
    key = f"{letter}{len(db[table])}"  # rows are never removed, only emptied, so that numbers stay
    db[table][key] = row
    return {"id": key, **row}


def find_people(db: Database, name: str = "", team: str = "") -> Any:
    """People whose name contains `name` and who are in `team`."""
    fits = lambda row: name.lower() in row["name"].lower() and team in ("", row["team"])  # noqa: E731
    return [{"id": key, **row} for key, row in db["people"].items() if fits(row)]


def list_meetings(db: Database, person: str = "", day: str = "") -> Any:
    """Meetings of a person's id, on a day, or all."""
    fits = lambda row: row and person in ("", row["person"]) and day in ("", row["day"])  # noqa: E731
    return [{"id": key, **row} for key, row in db["meetings"].items() if fits(row)]


def create_meeting(db: Database, title: str, person: str, day: str, hour: int) -> Any:
    """A new meeting with a person's id, whose hour must be free."""
    _row(db, "people", person)
    _require_free(db, person, _choice(day, DAYS, "day"), _choice(hour, HOURS, "hour"))
    return _new(db, "meetings", "m", {"title": title, "person": person, "day": day, "hour": hour})


def move_meeting(db: Database, meeting: str, day: str, hour: int) -> Any:
    """Moves a meeting to another day and hour, which must be free."""
    row = _row(db, "meetings", meeting)
    if not row:
        raise RefusedError(f"{meeting!r} is cancelled")
    _require_free(db, row["person"], _choice(day, DAYS, "day"), _choice(hour, HOURS, "hour"), beside=meeting)
    row |= {"day": day, "hour": hour}
    return {"id": meeting, **row}


def _require_free(db: Database, person: str, day: str, hour: int, *, beside: str = "") -> None:
    for key, row in db["meetings"].items():
        if key != beside and row and (row["person"], row["day"], row["hour"]) == (person, day, hour):
            raise RefusedError(f"{person} has the meeting {key} then")


def cancel_meeting(db: Database, meeting: str) -> Any:
    """Cancels a meeting."""
    _row(db, "meetings", meeting).clear()
    return {"cancelled": meeting}


def list_tickets(db: Database, state: str = "", assignee: str = "") -> Any:
    """Tickets in a state, of an assignee's id, or all."""
    fits = lambda row: state in ("", row["state"]) and assignee in ("", row["assignee"])  # noqa: E731
    return [{"id": key, **row} for key, row in db["tickets"].items() if fits(row)]


def create_ticket(db: Database, title: str, assignee: str) -> Any:
    """A new open ticket for an assignee's id."""
    _row(db, "people", assignee)
    return _new(db, "tickets", "t", {"title": title, "state": "open", "assignee": assignee})


def set_ticket(db: Database, ticket: str, state: str) -> Any:
    """Sets the state of a ticket: open, in_progress or done."""
    _row(db, "tickets", ticket)["state"] = _choice(state, STATES, "state")
    return {"id": ticket, **db["tickets"][ticket]}


def assign_ticket(db: Database, ticket: str, assignee: str) -> Any:
    """Gives a ticket to an assignee's id."""
    _row(db, "people", assignee)
    _row(db, "tickets", ticket)["assignee"] = assignee
    return {"id": ticket, **db["tickets"][ticket]}


def send_mail(db: Database, to: str, subject: str) -> Any:
    """Sends a mail to an address."""
    _choice(to, [row["email"] for row in db["people"].values()], "to")
    db["mails"].append({"to": to, "subject": subject})
    return {"sent": len(db["mails"])}


_TEXT, _WHOLE = {"type": "string"}, {"type": "integer"}
# By name: the function, its parameters, and which of them are required.
TOOLS: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]] = {
    "find_people": (find_people, {"name": _TEXT, "team": _TEXT}, ()),
    "list_meetings": (list_meetings, {"person": _TEXT, "day": _TEXT}, ()),
    "create_meeting": (create_meeting, {"title": _TEXT, "person": _TEXT, "day": _TEXT, "hour": _WHOLE},
                       ("title", "person", "day", "hour")),
    "move_meeting": (move_meeting, {"meeting": _TEXT, "day": _TEXT, "hour": _WHOLE}, ("meeting", "day", "hour")),
    "cancel_meeting": (cancel_meeting, {"meeting": _TEXT}, ("meeting",)),
    "list_tickets": (list_tickets, {"state": _TEXT, "assignee": _TEXT}, ()),
    "create_ticket": (create_ticket, {"title": _TEXT, "assignee": _TEXT}, ("title", "assignee")),
    "set_ticket": (set_ticket, {"ticket": _TEXT, "state": _TEXT}, ("ticket", "state")),
    "assign_ticket": (assign_ticket, {"ticket": _TEXT, "assignee": _TEXT}, ("ticket", "assignee")),
    "send_mail": (send_mail, {"to": _TEXT, "subject": _TEXT}, ("to", "subject")),
}  # fmt: skip
SCHEMAS = [
    {"type": "function", "function": {
        "name": name, "description": (function.__doc__ or "").strip(),
        "parameters": {"type": "object", "properties": parameters, "required": list(required)}}}
    for name, (function, parameters, required) in TOOLS.items()
]  # fmt: skip
KINDS = {"string": str, "integer": int}


def call(db: Database, name: str, arguments: Mapping[str, Any]) -> Any:
    """What the tool returns, after it has changed the database. Raises RefusedError, and changes nothing then."""
    if name not in TOOLS:
        raise RefusedError(f"no tool {name!r}; expected one of {', '.join(TOOLS)}")
    function, parameters, required = TOOLS[name]
    if missing := [field for field in required if field not in arguments]:
        raise RefusedError(f"{name} needs {missing[0]}")
    for field, value in arguments.items():
        kind = parameters.get(field)
        if kind is None or not isinstance(value, KINDS[kind["type"]]) or isinstance(value, bool):
            expected = "no such argument" if kind is None else f"a value of type {kind['type']}"
            raise RefusedError(f"{field} is {value!r}; expected {expected}")
    return function(db, **arguments)


class Workplace:
    """`level` steps are asked for in one task."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self._config = config

    def __len__(self) -> int:
        return self._config.examples

    def example(self, number: int) -> Example:
        """Task `number`: a database, what to do, and the calls that do it."""
        config = self._config
        rng = random.Random(f"workplace {config.level} {config.seed} {number}")
        db = database(rng)
        after, texts, calls = copy.deepcopy(db), [], []
        while len(calls) < config.level:
            text, name, arguments = rng.choice(REQUESTS)(rng, after)
            before = copy.deepcopy(after)
            try:
                call(after, name, arguments)
            except RefusedError:
                continue  # as a meeting in an hour that is taken: another request instead
            if after in (before, db):
                after = before  # nothing to do, or back where it began
                continue
            texts.append(text)
            calls.append((name, arguments))
        secret = {"start": db, "end": after, "calls": calls}
        return asked(str(number), " Then ".join(texts), secret, tools=SCHEMAS)

    def start(self, example: Example) -> Any:
        """The database, and the number of turns so far."""
        return {"database": copy.deepcopy(example.secret["start"]), "turns": 0}

    def step(self, example: Example, state: Any, said: Said) -> Turn:
        """Carries out the calls of a turn; a turn without any, or the last one, ends the episode."""
        db, turns = copy.deepcopy(state["database"]), state["turns"] + 1
        replies = []
        for name, arguments in said.calls:
            try:
                found = call(db, name, arguments)
            except RefusedError as error:
                found = {"error": str(error)}
            replies.append({"role": "tool", "content": json.dumps(found)})
        after = {"database": db, "turns": turns}
        if replies and turns < self._config.turns:
            return Turn(after, replies=replies)
        return Turn(after, rewards={"state": float(db == example.secret["end"])})


Asked = tuple[str, str, dict[str, Any]]


def _someone(rng: random.Random, db: Database) -> tuple[str, dict[str, Any]]:
    key = rng.choice(sorted(db["people"]))
    return key, db["people"][key]


def _something(rng: random.Random, table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    key = rng.choice([key for key in sorted(table) if table[key]] or ["none"])
    return key, table.get(key, {"title": "none"})


def _ask_meeting(rng: random.Random, db: Database) -> Asked:
    key, person = _someone(rng, db)
    title, day, hour = rng.choice(SUBJECTS), rng.choice(DAYS), rng.choice(HOURS)
    text = f"Book a meeting called '{title}' with {person['name']} on {day} at {hour}."
    return text, "create_meeting", {"title": title, "person": key, "day": day, "hour": hour}


def _ask_move(rng: random.Random, db: Database) -> Asked:
    key, _ = _something(rng, db["meetings"])
    day, hour = rng.choice(DAYS), rng.choice(HOURS)
    return f"Move the meeting {key} to {day} at {hour}.", "move_meeting", {"meeting": key, "day": day, "hour": hour}


def _ask_cancel(rng: random.Random, db: Database) -> Asked:
    key, _ = _something(rng, db["meetings"])
    return f"Cancel the meeting {key}.", "cancel_meeting", {"meeting": key}


def _ask_ticket(rng: random.Random, db: Database) -> Asked:
    key, person = _someone(rng, db)
    title = rng.choice(SUBJECTS)
    return f"Open a ticket '{title}' for {person['name']}.", "create_ticket", {"title": title, "assignee": key}


def _ask_state(rng: random.Random, db: Database) -> Asked:
    key, row = _something(rng, db["tickets"])
    return f"The ticket about {row['title']} ({key}) is done.", "set_ticket", {"ticket": key, "state": "done"}


def _ask_assign(rng: random.Random, db: Database) -> Asked:
    key, _ = _something(rng, db["tickets"])
    who, person = _someone(rng, db)
    return f"Give the ticket {key} to {person['name']}.", "assign_ticket", {"ticket": key, "assignee": who}


def _ask_mail(rng: random.Random, db: Database) -> Asked:
    _, person = _someone(rng, db)
    subject = rng.choice(SUBJECTS)
    text = f"Write a mail to {person['name']} with the subject '{subject}'."
    return text, "send_mail", {"to": person["email"], "subject": subject}


REQUESTS = (_ask_meeting, _ask_move, _ask_cancel, _ask_ticket, _ask_state, _ask_assign, _ask_mail)
