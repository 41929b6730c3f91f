"""Renders HTML pages with jinja2; every value is escaped."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training.runtime.messages import printable


def render_page(template: Path, **values: object) -> str:
    """Renders a template, which can include templates in the same folder; names need not be UTF-8.

    Raises:
        jinja2.UndefinedError: the template uses a name that is not in `values`.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return printable(environment.get_template(template.name).render(values))
