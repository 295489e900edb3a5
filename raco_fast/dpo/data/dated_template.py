"""Chat templates that write the date, made to write a given one.

Templates call transformers' `strftime_now(format)`. It cannot be given as a variable: transformers
hands only plain data to templates. A macro of that name at the template's beginning stands before
transformers' own; it holds what every directive of a format comes to at the given time.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from itertools import product

_FUNCTION = "strftime_now"
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ%"  # of the C standard and of glibc
_FLAGS = "-_0^#"  # of glibc: %-d is a day without its zero
# Nothing but the text of the macro's loop is written, and no newline behind it is swallowed.
_MACRO = """\
{{%- macro {name}(format) -%}}
{{%- set known = {known} -%}}
{{%- set state = namespace(open='') -%}}
{{%- for c in format -%}}
{{%- if state.open == '%' and c in '{flags}' -%}}{{%- set state.open = '%' + c -%}}
{{%- elif state.open -%}}{{{{ known.get(state.open + c, state.open + c) }}}}
{{%- set state.open = '' -%}}
{{%- elif c == '%' -%}}{{%- set state.open = '%' -%}}
{{%- else -%}}{{{{ c }}}}{{%- endif -%}}
{{%- endfor -%}}{{{{ state.open }}}}
{{%- endmacro %}}{{{{ '' }}}}"""


def may_write_date(template: str) -> bool:
    """Whether a template asks for the date; it need not write it into every conversation."""
    return _FUNCTION in template


@lru_cache(maxsize=8)
def dated(template: str, now: datetime) -> str:
    """The template with its clock stopped at `now`."""
    if not may_write_date(template):
        return template
    names = ["".join(parts) for parts in product("%", ["", *_FLAGS], _DIRECTIVES)]
    known = json.dumps({name: now.strftime(name) for name in names})
    return _MACRO.format(name=_FUNCTION, known=known, flags=_FLAGS) + template
