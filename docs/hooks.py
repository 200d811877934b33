"""What mkdocs does besides rendering: tables of settings from the code, and pages and pictures from outside docs/."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from mkdocs.structure.files import File, Files

from grpo_fast.config.reward_settings import RewardConfig
from grpo_fast.config.schema import described, field_help
from grpo_fast.config.settings import TrainConfig

ROOT = Path(__file__).parents[1]
CONFIGS = {"TrainConfig": TrainConfig, "RewardConfig": RewardConfig}
KERNELS_PAGE = "explanation/kernels.md"
_PICTURE = re.compile(r"\.\./(benchmarks/results/[\w.-]+\.png)")


def on_files(files: Files, *, config: Any) -> Files:
    """Takes the kernels' README and the pictures of the measured pages into the site."""
    pages = [file.content_string for file in files if file.src_uri.endswith(".md")]
    for name in sorted({name for page in pages for name in _PICTURE.findall(page)}):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, KERNELS_PAGE, abs_src_path=str(ROOT / "kernels" / "README.md")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Puts the settings' tables where a page asks for them, and points pictures into the site."""
    markdown = re.sub(r"<!-- settings: (\w+) -->", lambda found: settings_page(CONFIGS[found[1]]), markdown)
    return _PICTURE.sub(r"\1", markdown) if "/" not in page.file.src_uri else markdown


def settings_page(config: type) -> str:
    """A table of flags, values, defaults and meanings for every section of a configuration, as Markdown."""
    kinds: dict[str, Any] = get_type_hints(config)
    sections = {item.name: kinds[item.name] for item in fields(config) if is_dataclass(kinds[item.name])}
    parts = ["## Without a section", "", *_table(config, "", skip=set(sections))]
    for name, kind in sections.items():
        parts += [
            "",
            f"## {name}",
            "",
            (kind.__doc__ or "").splitlines()[0],
            "",
            *_table(kind, f"{name}.", skip=set()),
        ]
    return "\n".join(parts)


def _table(config: type, prefix: str, *, skip: set[str]) -> list[str]:
    helps, kinds, defaults = field_help(config), get_type_hints(config), config()
    rows = ["| flag | takes | default | |", "|---|---|---|---|"]
    for item in fields(config):
        if item.name not in skip:
            flag = f"--{prefix}{item.name}".replace("_", "-")
            cells = (described(kinds[item.name]), _shown(getattr(defaults, item.name)), helps[item.name])
            rows.append(f"| `{flag}` | {' | '.join(_cell(cell) for cell in cells)} |")
    return rows


def _shown(value: Any) -> str:
    if value is None or value in ("", (), {}):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
