"""What a start or an exception tells where Python itself does not say much."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import hosting, write_plugin

ODD_STARTS = {
    "a syntax error without a file": (
        "raise SyntaxError('made up')",
        "import_error",
        "import raised SyntaxError: made up at plugin.py:1 in `<module>`",
    ),
    "a syntax error in what it compiles itself": (
        "compile('x = (', '<formula>', 'exec')",
        "import_error",
        "<formula>:1 in `<module>`",
    ),
    "an attribute of the standard module that hides its own": (
        "import types\ntypes.detect",
        "import_error",
        "that is the standard library's `types`, not the plugin's own: rename the plugin's",
    ),
    "an attribute that a standard module does not have": (
        "import colorsys\ncolorsys.detect",
        "import_error",
        "import raised AttributeError: module 'colorsys' has no attribute 'detect' at plugin.py:2",
    ),
    "an exception without a place": (
        "class Odd(Exception):\n    __traceback__ = None\nraise Odd('here')",
        "import_error",
        "import raised plugin.Odd: here; mend it",
    ),
}


@pytest.mark.contract(3)
async def test_an_odd_start_says_what_can_be_known(plugins: Path, data_dir: Path) -> None:
    for number, (code, _, _) in enumerate(ODD_STARTS.values()):
        folder = write_plugin(plugins, f"odd_{number}", code, ["work"])
        (folder / "types.py").write_text("def detect(): ...")
    async with hosting(plugins, data_dir) as engine:
        for number, (case, (_, reason_code, words)) in enumerate(ODD_STARTS.items()):
            health = engine.health(f"odd_{number}")
            assert (health.state, health.reason_code) == ("FAILED", reason_code), case
            assert words in (health.reason or ""), (case, health.reason)
