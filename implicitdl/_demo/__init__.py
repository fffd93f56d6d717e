"""The report that `implicitdl demo` prints.

A chapter is a function `Context -> Section` in a file of its own. To add one, write the file and
put its function at the end of `CHAPTERS`. The models in its section reach the chapters after it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from . import certificates, classifier, conversion, robust, training, worst_case
from .report import Context, Section

Chapter = Callable[[Context], Section]

CHAPTERS: list[Chapter] = [
    classifier.chapter,
    conversion.chapter,
    robust.chapter,
    training.chapter,
    certificates.chapter,
    worst_case.chapter,
]


def run(
    context: Context,
    *,
    chapters: Sequence[Chapter] | None = None,
    write: Callable[[str], object] = print,
) -> list[Section]:
    """Work through the chapters and write each section as soon as it is done.

    Args:
        context: what the user asked for.
        chapters: `CHAPTERS` if None.
        write: what to do with the text of a section.

    Returns:
        The sections.
    """
    sections = []
    for chapter in CHAPTERS if chapters is None else chapters:
        section = chapter(context)
        write(str(section))
        sections.append(section)
        context = replace(context, models={**context.models, **section.models})
    return sections
