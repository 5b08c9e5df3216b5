"""docs/settings.md, made from the settings themselves: `python -m engine.settings_page > docs/settings.md`."""

from __future__ import annotations

import inspect
import re

import msgspec

from engine.settings import ENV_PREFIX, SECRET, Settings, wants

_HEAD = """# Settings

<!-- Made by `make docs` from engine/settings.py; a test fails when it is stale. -->

Defaults < `holdfast.toml` in the working directory (or `--config FILE`) < `HOLDFAST_*` variables < flags; a later
source replaces the whole value. In the file a setting is a top-level key (`port = 9000`); as a variable it is
`HOLDFAST_` and its name in capitals (`HOLDFAST_PORT=9000`; several `HOLDFAST_PLUGIN_DIRS` separate as in `PATH`).
What is not listed here is an error that names the nearest setting. In Python: `Settings(port=9000)`.

Paths are relative to the working directory; `~` is your home. Units stand in the names.
"""
_FIELD = re.compile(r"^    (\w+): .*?(?:  # (.*))?$")
_GROUP = re.compile(r"^    # (.*)$")


def page() -> str:
    """The page: a table per group of settings, in the order of the struct.

    Raises:
        LookupError: a setting has no comment that says what it is.
    """
    known = {field.name: field for field in msgspec.structs.fields(Settings)}
    lines = [_HEAD]
    for line in inspect.getsource(Settings).splitlines():
        if group := _GROUP.match(line):
            lines += [f"\n## {group[1]}\n", "| setting | wants | default | what it is |", "|---|---|---|---|"]
        elif (field := _FIELD.match(line)) and field[1] in known:
            if not field[2]:
                raise LookupError(f"setting `{field[1]}` has no comment")
            default = _default(known.pop(field[1]))
            lines.append(f"| `{field[1]}` | {wants(field[1])} | {default} | {field[2]} |")
    if known:
        raise LookupError(f"settings not found in the source: {', '.join(known)}")
    variables = ", ".join(f"`{ENV_PREFIX}{name.upper()}`" for name in sorted(SECRET))
    lines.append(f"\nPass secrets as variables ({variables}), not as flags: other users can see flags.")
    return "\n".join(lines) + "\n"


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return "`$XDG_STATE_HOME/holdfast`, else `~/.local/state/holdfast`"
    value = field.default
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value} ({value >> 20} MiB)"
    return f"`{value}`" if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(page(), end="")
