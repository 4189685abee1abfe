"""Run the scripts of this folder and write docs/claims.md.

    python scripts/reproduce/all.py              every script at its full setting (hours)
    python scripts/reproduce/all.py momentum mri_unet
                                                 only these; the others keep their figures
    python scripts/reproduce/all.py --quick      the quick half at small settings, a minute or two;
                                                 writes nothing

The figures are JSON lines in docs/claims.jsonl, from which docs/claims.md is written.
"""

import argparse
import dataclasses
import importlib
import json
from pathlib import Path

from claim import Claim, present

QUICK = ["momentum", "bias_correction", "sparse_words", "heavy_tail", "decoupled_decay"]
SLOW = ["mri_unet", "smollm2"]
DOCS = Path(__file__).parents[2] / "docs"
HEAD = """# Claims of the literature, tried out

Each section states what a source claims, how it was tried here, and what came out.
The problems are small, to run on a laptop's CPU. They show the order of the methods, not the
papers' numbers. Optimizers are built by `finetune.optim.build_optimizer`, with its defaults unless
a section says otherwise. Each section says how learning rates are chosen.

Measured on 2-core AMD EPYCs, torch 2.13 CPU, one thread. Most are in fp32, on a chip with AVX2.
SmolLM2 has bf16 products, on a chip with AVX512-BF16. This file is written by
`python scripts/reproduce/all.py` from `docs/claims.jsonl`; `--quick` runs the first five at smaller
settings.
"""


def read(path: Path) -> dict[str, Claim]:
    """Return the claims that are kept, by script."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines]
    return {record.pop("script"): Claim(**record) for record in records}


def sentence(text: str) -> str:
    """Return a clause as a sentence."""
    return f"{text[:1].upper()}{text[1:]}."


def document(claims: dict[str, Claim]) -> str:
    """Return the text of docs/claims.md."""
    found = "\n".join(
        f"| [{c.title}](#{name.replace('_', '-')}) | {c.verdict} |" for name, c in claims.items()
    )
    parts = [HEAD, f"| claim | verdict |\n| --- | --- |\n{found}\n"]
    if missing := [name for name in QUICK + SLOW if name not in claims]:
        commands = " and ".join(f"`python scripts/reproduce/all.py {name}`" for name in missing)
        parts.append(f"To be measured: {commands}.\n")
    for name, c in claims.items():
        parts.append(
            f'<a id="{name.replace("_", "-")}"></a>\n\n## {c.title}\n\n'
            f"**Claim.** {c.claim}. ([{c.source}]({c.url}))\n\n"
            f"**Setting.** {sentence(c.setting)} {sentence(c.seeds)}\n\n"
            f"{c.table()}\n\n"
            f"**Verdict: {c.verdict}**: {c.because}.\n\n"
            f"`python scripts/reproduce/{name}.py`\n"
        )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "scripts", nargs="*", metavar="SCRIPT", help=f"of {', '.join(QUICK + SLOW)}"
    )
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.scripts) - set(QUICK + SLOW):
        parser.error(
            f"there is no {', '.join(sorted(unknown))}; known are {', '.join(QUICK + SLOW)}"
        )
    kept = DOCS / "claims.jsonl"
    for name in given.scripts or (QUICK if given.quick else QUICK + SLOW):
        claim = importlib.import_module(name).reproduce(given.quick)
        present(claim)
        if not given.quick:
            claims = {**read(kept), name: claim}
            claims = {script: claims[script] for script in QUICK + SLOW if script in claims}
            lines = [
                json.dumps({"script": script, **dataclasses.asdict(c)}, ensure_ascii=False)
                for script, c in claims.items()
            ]
            kept.write_text("\n".join(lines) + "\n", encoding="utf-8")
            (DOCS / "claims.md").write_text(document(claims), encoding="utf-8")


if __name__ == "__main__":
    main()
