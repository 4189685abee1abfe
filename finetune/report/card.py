"""The model card of an export: README.md with the front matter that the hub reads.

https://huggingface.co/docs/hub/model-cards
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

HERE = "."
"""What a card calls the folder that it is in; a push puts the name on the hub there."""

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- finetune
{% for tag in tags %}
- {{ tag | quoted }}
{% endfor %}
{% if license %}
license: {{ license | string | quoted }}
{% endif %}
{% if base_model %}
base_model: {{ base_model | quoted }}
{% endif %}
---

# {{ title }}

{% if base_model %}
`{{ base_model }}`, fine-tuned with `finetune`.
{% else %}
A model with random initial weights, trained with `finetune`.
{% endif %}
{% if base_model and not license %}
The licence of the base model is not known here; it holds for this model too.
{% endif %}

## Use

```python
from transformers import pipeline

{% if speaks %}
answer = pipeline("text-generation", model="{{ here }}")([{"role": "user", "content": "Hello!"}])
{% else %}
answer = pipeline("text-generation", model="{{ here }}")("Once upon a time")
{% endif %}
print(answer[0]["generated_text"])
```

## Data

{% for line in data %}
- {{ line }}
{% endfor %}

## Results on held-out data

{% if metrics %}
| | {{ metrics.values() | first | join(" | ") }} |
|---|{% for _ in metrics.values() | first %}---:|{% endfor %}

{% for name, values in metrics.items() %}
| {{ name }} | {% for value in values.values() %}{{ "%.4g" | format(value) }} | {% endfor %}

{% endfor %}
{% else %}
None were measured.
{% endif %}

## Configuration

```yaml
{{ config | trim }}
```

Made with `{{ command }}`.
"""


def model_card(
    *,
    title: str,
    base_model: str | None,
    license: str | None,
    data: Sequence[str],
    metrics: Mapping[str, Mapping[str, float | None]],
    config: str,
    command: str,
    kind: str | None = None,
) -> str:
    """Return the card as Markdown.

    `base_model`: None for random initial weights. `data`: one line for each source. `metrics`:
    {"step 0": {"Held-out loss": 2.6, ...}, "step 40": {...}}, the same metrics in each. `config`:
    the run's YAML. `command`: what reproduces the run. `kind`: the format of the data.
    """
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters["quoted"] = json.dumps  # a JSON string is a YAML string
    return environment.from_string(_CARD).render(
        title=title,
        base_model=base_model,
        license=license,
        data=data,
        metrics=metrics,
        config=config,
        command=command,
        tags=[kind] if kind else [],
        speaks=kind in ("chat", "translation"),
        here=HERE,
    )


def base_card(*, title: str, base_model: str, license: str | None) -> str:
    """Return the card of a model that was not trained here."""
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {} if license is None else {"license": license}
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]
    lines.append(f"base_model: {json.dumps(base_model)}")
    unknown = "The licence of the base model is not known here; it holds for this model too.\n"
    return (
        "---\n" + "\n".join(lines) + f"\n---\n\n# {title}\n\n`{base_model}`, written by `finetune`."
        "\n" + ("" if license is not None else "\n" + unknown)
    )


def license_of(folder: str) -> str | None:
    """Return the licence in the front matter of a model folder's README.md, or None."""
    readme = Path(folder) / "README.md"
    return license_in(readme.read_text("utf-8", "replace") if readme.is_file() else "")


_LICENSE = re.compile(r"^license:[ \t]*(?:\n[ \t]*-[ \t]*)?[\"']?([\w.+-]+)", re.MULTILINE)
"""The licence in a front matter, or the first in a list of them."""


def license_in(card: str) -> str | None:
    """Return the licence in the front matter of a model card, or None."""
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    line = _LICENSE.search(front[1]) if front else None
    return line[1] if line else None
