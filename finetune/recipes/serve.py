"""`finetune serve`: a run or a model behind OpenAI's interface, with a page to try it."""

import contextlib
import copy
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.display import Display
from finetune.errors import UserError
from finetune.models.describe import tensor_bytes
from finetune.recipes.build.model import generation_settings
from finetune.recipes.build.target import Opened, open_base, open_target
from finetune.recipes.build.translation import learnt_directions, translation_format
from finetune.run.metrics import METRICS
from finetune.run.records import RunRecords, read_run
from finetune.run.wording import size

if TYPE_CHECKING:
    from finetune.serving.app import Server
    from finetune.serving.served import Served
    from finetune.serving.worker import Worker

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_WAITING = 64  # requests
MOST_EXAMPLES = 50  # held-out prompts that the page offers


@dataclass(frozen=True)
class Service:
    """A server that is ready to run, what it serves, and the thread that draws the answers."""

    served: "Served"
    worker: "Worker"
    server: "Server"
    listener: socket.socket
    host: str
    address: str  # such as http://127.0.0.1:8000

    def run(self) -> None:
        """Answer requests until a signal comes, or until `server.should_exit` is set."""
        try:
            self.server.run(sockets=[self.listener])
        finally:
            self.worker.close()


def run_service(service: Service, display: Display) -> None:
    """Answer requests until a signal comes, and say so at both ends.

    Answers that are being drawn then end, which their clients are told.
    """
    names = " and ".join(service.served.models)
    display.say(f"serving {names} at {service.address} (Ctrl-C ends it)")
    if service.host not in LOOPBACK:
        display.say(
            f"note: whoever reaches {service.host} can use the model and read the run's held-out "
            "prompts; there is no password and no encryption"
        )
    with contextlib.suppress(KeyboardInterrupt):
        service.run()
    display.say("the server has ended")


def open_service(
    target: str,
    *,
    host: str,
    port: int,
    base: bool,
    system_prompt: str | None,
    settings: Mapping[str, Any],
    trust: bool = False,
    most_waiting: int = MOST_WAITING,
    display: Display,
) -> Service:
    """Open the target, and return its server, which already holds its port.

    `base` serves the model that the run began with, too. `trust`: run the code that comes with the
    model. At most `most_waiting` requests wait. Raises UserError for a target that cannot be
    opened, for an address that is taken, and if the extra is not installed.
    """
    try:
        from finetune.serving.app import make_app, make_server
        from finetune.serving.worker import Worker
    except ImportError as error:
        raise UserError(
            f"finetune serve needs the package {error.name}. Install it with: pip install "
            "'finetune-rows[serve]'"
        ) from error
    with contextlib.ExitStack() as unless_it_serves:
        listener = unless_it_serves.enter_context(_listen(host, port))
        opened = open_target(target, trust=trust)
        served, batch_size = _served(opened, target, base, system_prompt, settings, display)
        worker = Worker(
            {name: each.model for name, each in served.models.items()},
            {name: copy.deepcopy(each.tokenizer) for name, each in served.models.items()},
            batch_size=batch_size,
            most_waiting=most_waiting,
        )
        app = make_app(served, worker, hosts=LOOPBACK if host in LOOPBACK else None)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        server = make_server(app, worker)
        unless_it_serves.pop_all()
    return Service(served, worker, server, listener, host, address)


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; taken before the model loads, which takes long."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with contextlib.ExitStack() as unless_it_listens:
            listener = unless_it_listens.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen()
            unless_it_listens.pop_all()
        return listener
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"the address {host}, port {port} cannot be used: {reason}. Give another with --port "
            "or --host"
        ) from error


def _served(
    opened: Opened,
    target: str,
    base: bool,
    system_prompt: str | None,
    settings: Mapping[str, Any],
    display: Display,
) -> tuple["Served", int]:
    """Return what is served, and how many answers are drawn at a time."""
    from finetune.serving.served import Served

    section = opened.settings(settings)
    system = opened.system_prompt(system_prompt, display)
    name = Path(target).resolve().name if Path(target).exists() else target
    models = {name: _model(opened, section, system, system_prompt)}
    base_name = None
    if base and opened.run is not None:
        try:
            began_with = open_base(opened)
        except UserError as error:
            display.say(f"note: the base model is not served: {error}")
        else:
            base_name = _base_name(opened, name)
            models[base_name] = _model(began_with, section, system, system_prompt)
            _say_memory(opened, began_with, display)
    about = _about(opened, name, base_name, system, section)
    report = None if opened.run is None else opened.run.report
    return Served(models, about=about, report=report), section.batch_size


def _model(opened: Opened, section: Any, system: str | None, given: str | None) -> Any:
    """Return a model as it is asked: with the system prompt of the run, or the one `given`."""
    from finetune.serving.served import ServedModel

    quiet = Display(enabled=False)
    directions = learnt_directions(opened)

    def translate(text: str, source: str | None, target: str | None, asked: str | None) -> Any:
        prompt = given if asked is None else asked
        format = translation_format(opened, source, target, quiet, system_prompt=prompt)
        return format.prompt(text, reverse=False, parse_control_tokens=False).input_ids

    template = opened.template() if opened.tokenizer.chat_template else None
    takes_system = template is not None and template.writes("system")
    if given and not takes_system:
        raise UserError(
            "this model has no chat template that takes a system prompt. Leave out --system"
        )
    return ServedModel(
        model=opened.model,
        tokenizer=opened.tokenizer,
        settings=generation_settings(section, opened.model, seed=None),
        template=template,
        system_prompt=system if takes_system else None,
        translate=translate if directions else None,
        directions=directions,
    )


def _base_name(opened: Opened, name: str) -> str:
    assert opened.config is not None
    assert opened.config.model.name is not None
    base = Path(opened.config.model.name).name
    return base if base != name else f"{base} (base)"


def _say_memory(opened: Opened, base: Opened, display: Display) -> None:
    both = [*opened.model.parameters(), *base.model.parameters()]
    held = tensor_bytes({each.data_ptr(): each for each in both}.values())
    display.say(f"the two models hold {size(held)} of weights, equal ones once")


def _about(
    opened: Opened, name: str, base: str | None, system: str | None, section: Any
) -> dict[str, Any]:
    """Return what the page shows of the run."""
    records = read_run(opened.run.root) if opened.run is not None else None
    directions = learnt_directions(opened)
    return {
        "trained": name,
        "base": base,
        "is_run": records is not None,
        "can_chat": bool(opened.tokenizer.chat_template),
        "directions": directions,
        "system_prompt": system or "",
        "settings": section.model_dump(
            include={"max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty"}
        ),
        "figures": _figures(records),
        "examples": [] if records is None else _examples(records, system),
        "has_report": opened.run is not None and opened.run.report.is_file(),
    }


def _figures(records: RunRecords | None) -> list[dict[str, Any]]:
    """Return the head figures before and after training."""
    if records is None or records.after is None:
        return []
    before = records.before.metrics if records.before is not None else None
    after = records.after.metrics
    return [
        {"name": metric.name, "before": metric.show(before), "after": metric.show(after)}
        for metric in METRICS
        if metric.short and metric.value(after) is not None
    ]


def _examples(records: RunRecords, system: str | None) -> list[dict[str, str | None]]:
    """Return held-out prompts that are one question, with their references and languages."""
    found: dict[str, dict[str, str | None]] = {}
    for sample in records.samples:
        question = _question(sample.prompt, system)
        if question is not None:
            answer = {"reference": sample.reference, "language": sample.language}
            found.setdefault(question, {"prompt": question, **answer})
    return list(found.values())[:MOST_EXAMPLES]


def _question(prompt: str, system: str | None) -> str | None:
    """Return the question of a sample, or None if it is a longer conversation."""
    text = prompt if system is None else prompt.removeprefix(f"system: {system}\n\n")
    turns = re.findall(r"^(system|user|assistant|tool|tools): ", text, re.MULTILINE)
    if not turns:
        return text
    return text.removeprefix("user: ") if turns == ["user"] and text != prompt else None
