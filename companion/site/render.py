"""HTML and Markdown from templates, in which no value can be more than text.

Every value is escaped and brought onto one line, and pages have no empty line inside a block of
HTML: it would end the block in Markdown, and what follows would be read as markup.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def _one_line(value: object) -> object:
    return re.sub(r"[^\S\xa0]+", " ", value).strip() if type(value) is str else value


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("companion.site"),
        autoescape=True,
        finalize=_one_line,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **values: Any) -> str:
    """Return a page made by ``templates/<template>``."""
    return _environment().get_template(template).render(values)


def fragment(template: str, macro: str, *values: Any, **options: Any) -> Markup:
    """Return what a macro of a template makes, as one block of HTML without an empty line."""
    text = getattr(_environment().get_template(template).module, macro)(*values, **options)
    return Markup("\n".join(line for line in text.splitlines() if line.strip()))
