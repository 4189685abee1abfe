"""Questions for a tool caller with one system text, and conversations of a support bot.

    python scripts/tool_calls_data.py FOLDER [--records 2000] [--kind tools|support] [--seed 0]

Writes train.jsonl and test.jsonl: seven declarations of tools as the system text of every record, a
question, and the call as the answer. --kind support writes a bot with house rules instead. All of
it is put together from the templates below, which are our own: Apache-2.0, as the project.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

TOOLS = (
    ("turn_on_light", "Turn a lamp on", {"room": "where the lamp is", "level": "0 to 100 %"}),
    ("set_alarm", "Ring at a time", {"time": "24 hours, as 07:30", "day": "day of the week"}),
    ("send_message", "Send a text to a contact", {"name": "of the contact", "text": "what to say"}),
    ("open_map", "Show the way to a place", {"place": "where to go", "by": "car, bus or foot"}),
    ("add_event", "Write into the calendar", {"title": "what happens", "day": "day of the week"}),
    ("play_music", "Play songs of an artist", {"artist": "whose songs", "minutes": "how long"}),
    ("get_weather", "Forecast for a city", {"city": "name of the city", "day": "day of the week"}),
)
ROOMS = ("kitchen", "hall", "cellar", "nursery", "garage", "study", "attic", "porch")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = ("Ada", "Bo", "Cleo", "Dev", "Eli", "Fay", "Gus", "Hana", "Ivo", "Juno")
CITIES = ("Oslo", "Lima", "Kyoto", "Accra", "Quito", "Turin", "Perth", "Dakar", "Porto", "Riga")
THINGS = ("the report", "our lunch", "the keys", "a new bike", "the garden", "my train", "the cake")
ARTISTS = ("Bach", "Satie", "Nina Simone", "Fela Kuti", "Bjork", "Miles Davis")
ORDERS = ("lamp", "kettle", "chair", "radio", "carpet", "mirror", "toaster", "desk")
RULES = (
    "You answer for a shop that sells things for the home. Be brief, kind and exact.",
    "Never promise a date that the customer did not see in the order's page.",
    "A parcel that is late by more than five days is sent again, and the customer pays nothing.",
    "Money comes back within ten days, the same way that it was paid.",
    "Broken things are taken back for two years. Ask for a picture, and for the order's number.",
    "Things that were worn, cut or painted are not taken back, unless they were broken before.",
    "If somebody is angry, say that you understand it, and name the next step.",
    "If you do not know, say so, and pass the question on to a colleague, who writes by evening.",
    "Do not speak about other shops, about politics, or about what other customers have bought.",
    "Prices are those of the page on the day of the order. Vouchers hold for one order each.",
)


def declarations() -> str:
    """Return the seven tools as the text of a system prompt."""
    schemas = []
    for name, description, parameters in TOOLS:
        properties = {key: {"type": "string", "description": d} for key, d in parameters.items()}
        schema = {"type": "object", "properties": properties}
        schemas.append({"name": name, "description": description, "parameters": schema})
    lines = "\n".join(json.dumps(schema, separators=(",", ":")) for schema in schemas)
    return f"Answer with one call of a tool, as JSON and nothing else. The tools:\n{lines}"


def tool_call(generator: random.Random) -> dict[str, Any]:
    """Return a question, and the call that answers it."""
    pick = generator.choice
    day, name, city, thing = pick(DAYS), pick(NAMES), pick(CITIES), pick(THINGS)
    hour, level = (
        f"{generator.randint(5, 22):02}:{pick(('00', '15', '30', '45'))}",
        5 * pick(range(21)),
    )
    question, tool, arguments = pick(
        (
            (f"Please put the light in the {(room := pick(ROOMS))} to {level} percent, it is dark.",
             "turn_on_light", {"room": room, "level": str(level)}),
            (f"I have to get up at {hour} on {day}. Could you wake me, please?",
             "set_alarm", {"time": hour, "day": day}),
            (f"Tell {name} that I will bring {thing} on {day}, a bit after {hour}.",
             "send_message", {"name": name, "text": f"I bring {thing} on {day} after {hour}."}),
            (f"How do I get to {city} by {(way := pick(('car', 'bus', 'foot')))} from here?",
             "open_map", {"place": city, "by": way}),
            (f"Write down that {name} and I talk about {thing} next {day}.",
             "add_event", {"title": f"talk with {name} about {thing}", "day": day}),
            (f"I would like to hear {(artist := pick(ARTISTS))} for about {level + 10} minutes.",
             "play_music", {"artist": artist, "minutes": str(level + 10)}),
            (f"Will I need an umbrella in {city} on {day}, or does it stay dry?",
             "get_weather", {"city": city, "day": day}),
        )
    )  # fmt: skip
    call = json.dumps({"name": tool, "arguments": arguments})
    return conversation(declarations(), question, call)


def support_case(generator: random.Random) -> dict[str, Any]:
    """Return a question to a support bot, and its answer."""
    pick = generator.choice
    thing, name, days = pick(ORDERS), pick(NAMES), generator.randint(1, 20)
    order = f"{generator.randint(10_000, 99_999)}"
    question, answer = pick(
        (
            (f"Hello, my {thing} of order {order} is {days} days late. Where is it? {name}",
             f"Hello {name}, I am sorry. "
             + (f"As it is {days} days late, we send the {thing} again, at no cost." if days > 5
                else f"Please wait until it is five days late, then we send the {thing} again.")),
            (f"The {thing} that came today (order {order}) is broken. What now? Thanks, {name}",
             f"Hello {name}, I am sorry to hear that. Please send a picture of the {thing} of "
             f"order {order}. We take it back, and you choose a new one or the money."),
            (f"I sent the {thing} back {days} days ago, order {order}. When is my money here?",
             "Hello, money comes back within ten days, the same way that it was paid. "
             + (f"That is over for order {order}, so a colleague writes to you by evening."
                if days > 10 else f"For order {order} it takes {10 - days} more at most.")),
        )
    )  # fmt: skip
    return conversation("\n".join(RULES), question, answer)


def conversation(system: str, question: str, answer: str) -> dict[str, Any]:
    turns = (("system", system), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(folder: Path, kind: str, count: int, seed: int) -> None:
    """Write train.jsonl, and test.jsonl with a tenth as many records and no equal question."""
    make, generator = {"tools": tool_call, "support": support_case}[kind], random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, dict[str, Any]] = {}
    for _ in range(100 * count):
        record = make(generator)
        known.setdefault(record["messages"][1]["content"], record)
        if len(known) >= count + count // 10:
            break
    records = list(known.values())
    held_out = len(records) // 11
    for name, part in (("test", records[:held_out]), ("train", records[held_out:])):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=2000, help="to train on, at most")
    parser.add_argument("--kind", choices=("tools", "support"), default="tools")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.folder, args.kind, args.records, args.seed)
