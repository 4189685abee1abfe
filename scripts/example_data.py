"""The conversations with calls of tools and with thoughts that come with the package.

    python scripts/example_data.py

It writes tools.en.*.jsonl and thinking.en.*.jsonl into finetune/resources/data. They show the shape
of such data and are small: what a model learns of them is the form of a call and of a thought.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "finetune" / "resources" / "data"
CITIES = ("Oslo", "Lima", "Kyoto", "Accra", "Quito", "Turin", "Perth", "Dakar", "Porto", "Riga")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COINS = ("EUR", "USD", "JPY", "GBP", "NOK", "CHF")
NAMES = ("Ada", "Bo", "Cleo", "Dev", "Eli", "Fay")
THINGS = ("apples", "pens", "stamps", "eggs", "coins", "books")

Record = dict[str, Any]


def tool(name: str, description: str, **parameters: tuple[str, str]) -> Record:
    """Return a tool as a JSON schema; each parameter is (type, description), all required."""
    properties = {key: {"type": t, "description": d} for key, (t, d) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = [
    tool(
        "get_weather",
        "The weather in a city on a day",
        city=("string", "name of the city"),
        day=("string", "day of the week"),
    ),
    tool(
        "convert_currency",
        "An amount of money in another currency",
        amount=("number", "how much"),
        source=("string", "code of its currency"),
        target=("string", "code of the wanted currency"),
    ),
    tool(
        "add_reminder",
        "Remember something for a day",
        text=("string", "what to remember"),
        day=("string", "day of the week"),
    ),
]


def with_call(question: str, name: str, arguments: Record, result: Record, answer: str) -> Record:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": json.dumps(result)},
            {"role": "assistant", "content": answer},
        ],
        "tools": TOOLS,
    }


def weather(draw: random.Random) -> Record:
    city, day, degrees = draw.choice(CITIES), draw.choice(DAYS), draw.randint(-5, 35)
    asked = draw.choice(("What will the weather be in {} on {}?", "How warm is {} on {}?"))
    return with_call(
        asked.format(city, day),
        "get_weather",
        {"city": city, "day": day},
        {"degrees": degrees},
        f"In {city} it will be {degrees} degrees on {day}.",
    )


def money(draw: random.Random) -> Record:
    amount, (source, target) = draw.randint(2, 90) * 5, draw.sample(COINS, 2)
    result = amount * draw.randint(2, 9)
    asked = draw.choice(("How much is {} {} in {}?", "Convert {} {} to {}, please."))
    return with_call(
        asked.format(amount, source, target),
        "convert_currency",
        {"amount": amount, "source": source, "target": target},
        {"amount": result},
        f"{amount} {source} are {result} {target}.",
    )


def reminder(draw: random.Random) -> Record:
    text, day = f"call {draw.choice(NAMES)}", draw.choice(DAYS)
    asked = draw.choice(("Remind me to {} on {}.", "I must {} on {}, do not let me forget it."))
    return with_call(
        asked.format(text, day),
        "add_reminder",
        {"text": text, "day": day},
        {"saved": True},
        f"I will remind you to {text} on {day}.",
    )


def puzzle(draw: random.Random) -> Record:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    have, more, away = draw.randint(5, 40), draw.randint(2, 30), draw.randint(1, 6)
    total = have + more
    thought = (
        f"{name} starts with {have} {thing}. "
        f"After {more} more there are {have} + {more} = {total}. "
        f"Then {away} go away: {total} - {away} = {total - away}."
    )
    question = (
        f"{name} has {have} {thing}, gets {more} more and gives {away} away. "
        f"How many {thing} are left?"
    )
    answer = f"{name} has {total - away} {thing} left."
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "reasoning_content": thought, "content": answer},
        ]
    }


def write(name: str, makers: list[Callable[[random.Random], Record]], counts: Record) -> None:
    """Write files of different records, as many as `counts` says for each part."""
    draw, seen = random.Random(name), set()
    for part, count in counts.items():
        lines: list[str] = []
        while len(lines) < count:
            line = json.dumps(makers[len(lines) % len(makers)](draw))
            if line not in seen:
                seen.add(line)
                lines.append(line)
        path = FOLDER / f"{name}.{part}.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    write("tools.en", [weather, money, reminder], {"train": 150, "test": 24})
    write("thinking.en", [puzzle], {"train": 150, "test": 24})
