"""Tokens with roles, held as digests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from http_support import serving
from support import settings_for, write_honest

from engine.api.tokens import Role, Tokens, digest, make, read
from engine.errors import SetupError

RUN = "/v1/plugins/honest/tools/echo/run"
RESTART = "/v1/plugins/honest/restart"


def token_file(folder: Path) -> tuple[Path, dict[Role, str]]:
    """A file with a token for each role."""
    path = folder / "tokens.toml"
    made = {role: make(f"the-{role.value}-one", role) for role in Role}
    path.write_text("".join(entry for _, entry in made.values()))
    path.chmod(0o600)
    return path, {role: token for role, (token, _) in made.items()}


async def test_a_token_may_do_what_its_role_says_and_nothing_above(
    plugins: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_honest(plugins)
    path, tokens = token_file(tmp_path)
    allowed = {Role.READ: (200, 403, 403), Role.RUN: (200, 200, 403), Role.ADMIN: (200, 200, 200)}
    async with serving(plugins, data_dir, token_file=path) as lab:
        for role, statuses in allowed.items():
            headers = {"Authorization": f"Bearer {tokens[role]}"}
            for (method, route), status in zip(
                (("GET", "/v1/plugins"), ("POST", RUN), ("POST", RESTART)), statuses, strict=True
            ):
                async with lab.http.request(method, route, headers=headers) as response:
                    assert response.status == status, (role, route)
                    if status == 403:
                        error = (await response.json())["error"]
                        assert f"the-{role.value}-one" in error
                        assert tokens[role] not in error
        async with lab.http.get("/v1/plugins", headers={"Authorization": "Bearer of-bad-news"}) as response:
            assert response.status == 401
        async with lab.http.get(
            "/no/such/route", headers={"Authorization": f"Bearer {tokens[Role.READ]}"}
        ) as response:
            assert response.status == 404


def test_the_file_holds_no_token(tmp_path: Path) -> None:
    path, tokens = token_file(tmp_path)
    text = path.read_text()
    assert not any(token in text for token in tokens.values())
    assert [entry.sha256 for entry in read(path)] == [digest(token) for token in tokens.values()]


def test_the_settings_token_may_do_everything(tmp_path: Path) -> None:
    path, tokens = token_file(tmp_path)
    known = Tokens(settings_for(tmp_path, tmp_path, token="s3cret", token_file=path))
    found = known.find("s3cret")
    assert found is not None
    assert found.role is Role.ADMIN
    assert known.find(tokens[Role.READ]) is not None
    assert known.find("") is None
    assert known.find("\udcff") is None


BAD = {
    "empty": ("", "no [[token]]"),
    "no_toml": ("[[token", "not valid"),
    "unknown_role": (f'[[token]]\nname = "x"\nrole = "root"\nsha256 = "{"0" * 64}"', "root"),
    "no_digest": ('[[token]]\nname = "x"\nrole = "run"\nsha256 = "s3cret"', "not valid"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_token_file_that_cannot_be_used_stops_the_start(case: str, tmp_path: Path) -> None:
    text, words = BAD[case]
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(SetupError) as caught:
        read(path)
    assert words in str(caught.value)
    assert "holdfast token" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_token_file_that_others_may_change_stops_the_start(tmp_path: Path) -> None:
    path, _ = token_file(tmp_path)
    path.chmod(0o666)
    with pytest.raises(SetupError, match="chmod 600"):
        read(path)


def test_the_command_line_prints_a_token_once_and_keeps_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    command = [sys.executable, "-m", "engine", "token", "grafana", "--role", "read", "--file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    token = done.stdout.strip()
    (entry,) = read(path)
    assert (entry.name, entry.role, entry.sha256) == ("grafana", Role.READ, digest(token))
    assert token not in done.stderr
    assert path.stat().st_mode & 0o077 == 0
    wrong = subprocess.run([*command[:-4], "--role", "root"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "admin" in wrong.stderr
