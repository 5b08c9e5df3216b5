"""The commands and their flags. Each imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from engine.cli.console import ExitCode, Failure, note, say, write_json

app = typer.Typer(
    name="holdfast",
    help="A crash-proof engine for Python plugins. "
    "Exit codes: 0 fine, 1 the plugin failed, 2 wrong use, 3 no server, 130 Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
audit_app = typer.Typer(help="Look after the audit file.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(audit_app, name="audit")

PluginDirs = Annotated[
    list[Path] | None,
    typer.Option("--plugins", metavar="DIR", help="A folder of plugins, or one plugin. Repeatable."),
]
NoBundled = Annotated[bool, typer.Option("--no-bundled", help="Leave out the plugins that come with Holdfast.")]
Json = Annotated[bool, typer.Option("--json", help="For machines.")]
Url = Annotated[str, typer.Option("--url", help="The server's address.")]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="HOLDFAST_TOKEN", show_envvar=True, help="The server's token.", show_default=False
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The plugin's name.")]
DEFAULT_URL = "http://127.0.0.1:8700"


def _print_version(wanted: bool) -> None:
    if wanted:
        from engine.engine import VERSION

        say(f"holdfast {VERSION}")
        raise typer.Exit


@app.callback()
def _holdfast(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    plugins: PluginDirs = None,
    no_bundled: NoBundled = False,
    host: Annotated[str | None, typer.Option(help="The address to bind; any but loopback needs a token.")] = None,
    port: Annotated[int | None, typer.Option(help="By default 8700; 0 takes a free one.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="For the event log and the audit.")] = None,
    repair_log: Annotated[bool, typer.Option("--repair-log", help="Move a damaged event log aside.")] = False,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Instead of ./holdfast.toml.")] = None,
) -> None:
    """Host plugins and serve them over HTTP. Settings: flags, HOLDFAST_* variables, holdfast.toml."""
    from engine.settings import load

    flags: dict[str, object] = {"host": host, "port": port, "data_dir": data}
    flags |= {"plugin_dirs": tuple(plugins) if plugins else None}
    flags |= {"bundled": False if no_bundled else None, "repair_log": True if repair_log else None}
    settings = load({name: value for name, value in flags.items() if value is not None}, file=config)

    import uvloop

    from engine.cli.hosting import serve as serve_until_stopped

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        raise typer.Exit(runner.run(serve_until_stopped(settings)))


@app.command()
def run(
    plugin: Annotated[str, typer.Argument(metavar="PLUGIN")],
    tool: Annotated[str, typer.Argument(metavar="TOOL")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE | KEY=@FILE]...", help="KEY=@@x is the text @x.", show_default=False),
    ] = None,
    plugins: PluginDirs = None,
    no_bundled: NoBundled = False,
    url: Annotated[str | None, typer.Option(help="Ask this server and no engine of your own.")] = None,
    token: Token = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the value or the items there.")] = None,
    json: Json = False,
) -> None:
    """Run a tool: by the server at --url; by an engine of your own with --plugins; else by whichever is there."""
    from engine.cli.arguments import read_form
    from engine.cli.run import Order, check_out
    from engine.cli.run import run as run_order

    check_out(out)
    order = Order(
        plugin=plugin,
        tool=tool,
        form=read_form(arguments or ()),
        plugin_dirs=tuple(plugins or ()),
        bundled=not no_bundled,
        url=url,
        token=token,
        out=out,
        json=json,
    )
    _finish(lambda: run_order(order))


@app.command(name="list")
def list_(url: Url = DEFAULT_URL, token: Token = None, json: Json = False) -> None:
    """Show every plugin of a server: state, calls, reason."""
    from engine.cli import look
    from engine.cli.http import Server

    _finish(lambda: look.list_plugins(Server(url, token), json=json))


@app.command()
def health(name: Name, url: Url = DEFAULT_URL, token: Token = None, json: Json = False) -> None:
    """Show one plugin's health; exit 1 where it is FAILED or UNAVAILABLE."""
    from engine.cli import look
    from engine.cli.http import Server

    _finish(lambda: look.show_health(Server(url, token), name, json=json))


@app.command()
def crashes(name: Name, url: Url = DEFAULT_URL, token: Token = None, json: Json = False) -> None:
    """Show how a plugin's workers died, the newest first; --json has all the evidence."""
    from engine.cli import look
    from engine.cli.http import Server

    _finish(lambda: look.show_crashes(Server(url, token), name, json=json))


@app.command()
def restart(name: Name, url: Url = DEFAULT_URL, token: Token = None, json: Json = False) -> None:
    """Begin a plugin's next incarnation, read again from disk; exit 1 where it does not come into service."""
    from engine.cli import look
    from engine.cli.http import Server

    _finish(lambda: look.show_health(Server(url, token), name, json=json, restart=True))


@app.command()
def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    after: Annotated[int, typer.Option(metavar="N", min=0, help="Only events after this number.")] = 0,
    plugin: Annotated[str | None, typer.Option(metavar="NAME", help="Only this plugin's.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Show a server's events, from the log and, with --follow, live."""
    from engine.cli import look
    from engine.cli.http import Server

    server = Server(url, token)
    _finish(lambda: look.show_events(server, after=after, plugin=plugin, follow=follow, json=json))


@app.command()
def check(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="[DIR]...", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Start, validate and stop each plugin in the folders (else the bundled ones); exit 1 if one is not fit."""
    from engine.cli import hosting

    _finish(lambda: hosting.check(folders or (), json=json))


@audit_app.command()
def verify(file: Annotated[Path, typer.Argument(metavar="FILE")], json: Json = False) -> None:
    """Find the first altered, missing, inserted, reordered or torn line; exit 1 if there is one."""
    from events.audit_verify import verify as verify_audit

    try:
        report = verify_audit(file)
    except OSError as exc:
        text = f"{file} cannot be read ({exc.strerror}); name the audit.jsonl of a data folder"
        raise Failure(ExitCode.WRONG_USE, text) from None
    if json:
        write_json(report)
    elif report.ok:
        say(f"{file}: sound, {report.lines} lines, up to event {report.last}")
    else:
        note(f"{file}: line {report.bad_line} is {report.trouble}: {report.detail}; trust what stands before it")
    raise typer.Exit(ExitCode.FINE if report.ok else ExitCode.PLUGIN_FAILED)


@app.command()
def token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose token it is; shown where it is not enough.")],
    role: Annotated[str, typer.Option(help="read, run or admin; each includes those before it.")] = "run",
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="The token_file to add it to.")] = None,
) -> None:
    """Make a token: printed once, and kept as a digest only. Restart the server to make it known."""
    from engine.api.tokens import Role, add, make

    try:
        made, entry = make(name, Role(role))
    except ValueError as exc:
        step = f"give a name of letters and digits, and a role of {', '.join(Role)}"
        raise Failure(ExitCode.WRONG_USE, f"{exc}; {step}") from None
    if file is None:
        note("add this to the file that the setting token_file names:")
        print(entry, file=sys.stderr)
    else:
        add(file, entry)
        note(f"{name} may {role} once the server is restarted; its digest is in {file}")
    print(made)


def _finish(work: Callable[[], Coroutine[Any, Any, ExitCode]]) -> None:
    """Run a command's coroutine; SIGTERM ends it as cleanly as Ctrl-C."""
    terminated = False

    async def watched() -> ExitCode:
        task = asyncio.current_task()

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            if task is not None:
                task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
        return await work()

    try:
        code = asyncio.run(watched())
    except KeyboardInterrupt:
        raise Failure(ExitCode.INTERRUPTED, "interrupted") from None
    except asyncio.CancelledError:
        if not terminated:
            raise
        raise Failure(ExitCode.TERMINATED, "terminated") from None
    except BrokenPipeError:  # `holdfast list | head`: who reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.FINE
    raise typer.Exit(code)


def run_command_line() -> int:
    """Run the command line; the exit code. Whatever goes wrong is one line on stderr."""
    from engine.errors import SetupError

    try:
        code = app(prog_name="holdfast", standalone_mode=False)
    except Failure as failure:
        note(failure.text)
        return failure.code
    except SetupError as exc:
        note(str(exc))
        return ExitCode.WRONG_USE
    except TyperException as exc:
        return _usage_error(exc)
    return code if isinstance(code, int) else ExitCode.FINE


def _usage_error(exc: TyperException) -> int:
    context = getattr(exc, "ctx", None)
    said = exc.format_message() if hasattr(exc, "format_message") else str(exc)
    if type(exc).__name__ == "NoArgsIsHelpError":  # its message is the help
        print(said)
        return ExitCode.WRONG_USE
    path = "holdfast" if context is None else context.command_path
    note(f"{said.rstrip('.')}; see {path} --help")
    return ExitCode.WRONG_USE
