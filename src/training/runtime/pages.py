"""HTML pages: jinja2 renders them, and every value is escaped."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render_page(template: Path, **values: object) -> str:
    """Returns the page that a template gives; templates of the same folder can be included.

    Raises:
        jinja2.UndefinedError: the template uses a name that is not among `values`.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)
