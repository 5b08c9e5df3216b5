"""`docs/lifecycle.md`, from the machine itself: `python -m engine.lifecycle.diagram > docs/lifecycle.md`."""

from __future__ import annotations

from engine.lifecycle.machine import MACHINE
from engine.lifecycle.states import ENTRY, FINAL, TRANSITIONS

_WHEN = {row.trigger.value: row.when for row in TRANSITIONS}

_PAGE = """\
# The lifecycle of a plugin

This page is written by `python -m engine.lifecycle.diagram > docs/lifecycle.md`, from the machine that the
engine runs. A test fails when the two differ.

```mermaid
stateDiagram-v2
{diagram}
```

| trigger | from | to | when |
|---|---|---|---|
{table}

Every transition is one event, `plugin.transition`. Anything that is not in the table raises `IllegalTransition`
and changes nothing. {final} are final: nothing leads out of them. A manual restart does not lead out either; it
ends this *incarnation* and begins the next one, one number higher, at {entry}, with the manifest and the code
read again from disk.

FAILED means that the plugin was tried and broke. UNAVAILABLE means that it cannot work on this machine until
somebody installs or plugs in something. Both always carry a `reason_code` and a `reason`: fact, cause, next step.
"""


def page() -> str:
    """The whole page."""
    edges = [
        (name, source, transition.dest)
        for name, event in MACHINE.events.items()
        for source, transitions in event.transitions.items()
        for transition in transitions
    ]
    lines = [f"    [*] --> {ENTRY.value}: discovered"]
    lines += [f"    {source} --> {dest}: {name}" for name, source, dest in edges]
    lines += [f"    {state.value} --> [*]: restart" for state in sorted(FINAL)]
    rows = [f"| (entry) | – | {ENTRY.value} | it was discovered and registered |"]
    for name in MACHINE.events:
        sources = [source for trigger, source, _ in edges if trigger == name]
        dest = next(dest for trigger, _, dest in edges if trigger == name)
        rows.append(f"| `{name}` | {', '.join(sources)} | {dest} | {_WHEN[name]} |")
    return _PAGE.format(
        diagram="\n".join(lines),
        table="\n".join(rows),
        final=" and ".join(sorted(state.value for state in FINAL)),
        entry=ENTRY.value,
    )


if __name__ == "__main__":
    print(page(), end="")
