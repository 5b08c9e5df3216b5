"""The speed report: ratios, verdicts, tables, JSON. The figures are made up, the functions are the real ones."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from benchmarks.machine import Machine, file_system
from benchmarks.plots import labels, limits
from benchmarks.probes import PROBES
from benchmarks.rows import CHECKS, PLOTS, ROWS, Check, checks_of, probe_of, probes_for
from benchmarks.speed_report import (
    BEGIN,
    END,
    Speed,
    Trouble,
    cells,
    judge,
    replace_section,
    shown,
    spreads,
    to_markdown,
    to_terminal,
)
from benchmarks.stats import percentile

ROOT = Path(__file__).resolve().parent.parent
AT_MOST = Check("call", "a call", "holdfast.p50_us", "echo.p50_us", 1.25, least=("least.p50_us", "echo.p50_us"))
AT_LEAST = Check("throughput", "a rate", "holdfast.per_s", "pebble.per_s", 1.5, at_least=True)
ALONE = Check("memory", "a worker", "engine.worker_mib", None, 2)
NONE_LOST = Check("publish", "lost", "publish.lost_in_log", None, 0, worst=True)
MACHINE = Machine("2026-01-02", 2, "a CPU", 24, "6.1", "3.11.7", {"holdfast": "0.1.0"})


def rounds(name: str, *values: float) -> list[dict[str, float]]:
    """Rounds that measured one figure."""
    return [{name: value} for value in values]


def a_run(checks: tuple[Check, ...], measured: list[dict[str, float]], *troubles: Trouble) -> Speed:
    """A run that measured this."""
    judged = [judge(check, measured) for check in checks]
    facts = (MACHINE, "abc", "ext4", "x.mp4", 0.5, False, len(measured))
    return Speed(*facts, judged, spreads(measured), list(troubles))


def in_terminal(speed: Speed) -> str:
    """What the terminal shows."""
    out = io.StringIO()
    to_terminal(Console(file=out, width=200), speed)
    return out.getvalue()


def test_a_ratio_is_of_two_figures_of_the_same_round() -> None:
    # The machine was half as fast in the second round: both figures doubled, the ratio did not move.
    measured = [{"holdfast.p50_us": us, "echo.p50_us": us / 1.2} for us in (100.0, 200.0, 100.0)]
    measured[2]["echo.p50_us"] = 50.0
    judged = judge(AT_MOST, measured)
    assert judged.ratio is not None
    assert judged.ratio.rounds == pytest.approx((1.2, 1.2, 2.0))
    assert judged.ratio.median == pytest.approx(1.2)
    assert (judged.ratio.low, judged.ratio.high) == pytest.approx((1.2, 2.0))
    assert judged.holds


@pytest.mark.parametrize(("ratio", "holds"), [(1.24, True), (1.25, True), (1.26, False)])
def test_at_most_holds_up_to_its_ratio(ratio: float, holds: bool) -> None:
    measured = [{"holdfast.p50_us": ratio * 64, "echo.p50_us": 64.0}]
    assert judge(AT_MOST, measured).holds is holds


@pytest.mark.parametrize(("ratio", "holds"), [(1.49, False), (1.5, True), (1.51, True)])
def test_at_least_holds_from_its_ratio_on(ratio: float, holds: bool) -> None:
    measured = [{"holdfast.per_s": ratio * 64, "pebble.per_s": 64.0}]
    assert judge(AT_LEAST, measured).holds is holds


def test_a_figure_without_a_base_is_judged_in_its_own_unit() -> None:
    assert judge(ALONE, rounds("engine.worker_mib", 1.0, 1.9, 3.0)).holds
    assert not judge(ALONE, rounds("engine.worker_mib", 1.0, 2.1, 3.0)).holds


def test_one_bad_round_spoils_what_every_round_has_to_hold() -> None:
    assert judge(NONE_LOST, rounds("publish.lost_in_log", 0, 0, 0)).holds
    assert not judge(NONE_LOST, rounds("publish.lost_in_log", 0, 0, 1)).holds


def test_a_round_that_could_not_be_measured_does_not_hold() -> None:
    measured = [*rounds("engine.worker_mib", 1.0, 1.0), {}]
    assert not judge(ALONE, measured).holds
    never = judge(ALONE, [{}, {}])
    assert (never.ratio, never.holds) == (None, False)
    assert cells(never, {})[-1] == "not measured"


def test_the_least_is_shown_beside_a_ratio_and_decides_nothing() -> None:
    measured = [{"holdfast.p50_us": 130.0, "echo.p50_us": 100.0, "least.p50_us": us} for us in (90.0, 150, 140)]
    judged = judge(AT_MOST, measured)
    assert judged.least is not None
    assert (judged.least.median, judged.holds) == (1.4, False)
    assert cells(judged, spreads(measured))[-2] == "1.40 ×"


def test_a_base_of_nothing_is_no_ratio() -> None:
    assert judge(AT_MOST, [{"holdfast.p50_us": 1.0, "echo.p50_us": 0.0}]).ratio is None


def test_every_figure_of_a_condition_and_a_plot_is_of_a_probe() -> None:
    named = [name for check in CHECKS for name in check.figures]
    named += [figure for plot in PLOTS for figure in plot.figures]
    assert {probe_of(name) for name in named} <= set(PROBES)


def test_every_row_has_a_condition_and_every_condition_a_row() -> None:
    assert {check.row for check in CHECKS} == set(ROWS)


def test_a_part_measures_its_bases_and_the_peers_of_its_plot_in_the_order_of_a_round() -> None:
    assert probes_for(checks_of(["http-run"])) == ("http-run",)  # which loads its bases in turn with itself
    assert probes_for(checks_of(["worker-start"])) == ("python", "least-start", "worker")
    call = probes_for(checks_of(["call"]))
    assert call.index("echo") < call.index("holdfast") < call.index("ray")


def test_the_table_that_measures_everything_uses_every_probe() -> None:
    assert set(probes_for(CHECKS)) == set(PROBES)


@pytest.mark.parametrize(
    ("figure", "value", "text"),
    [
        ("echo.p50_us", 71.96, "72.0 µs"),
        ("copy.p50_ms", 0.1449, "0.14 ms"),
        ("bare.per_s", 27442.4, "27 442/s"),
        ("engine.worker_mib", 4.943, "4.94 MiB"),
        ("publish.lost_in_log", 0, "0"),
        ("sse.engine_cores", 1.001, "1.00 cores"),
        ("python.hundred_s", 3.6, "3.60 s"),
    ],
)
def test_a_figure_is_shown_with_its_unit(figure: str, value: float, text: str) -> None:
    assert shown(figure, value) == text


def test_the_terminal_shows_each_condition_its_bases_and_what_failed() -> None:
    measured = [{"holdfast.p50_us": 200.0, "echo.p50_us": 100.0, "ray.p50_us": 900.0}]
    text = in_terminal(a_run((AT_MOST, ALONE), measured, Trouble("engine", 1, "RuntimeError: [no] worker")))
    assert "asyncio streams echo 100 µs" in text
    assert "2.00 ×" in text
    assert "≤ 1.25 ×" in text
    assert "does not hold" in text
    assert "not measured" in text
    assert "ray.p50_us 900 µs" in text  # named by no condition, shown all the same
    assert "round 1, engine: RuntimeError: [no] worker" in text
    assert "0 of 2 hold; medians of 1 rounds" in text


def test_the_readme_table_has_a_line_for_each_condition_and_says_where_it_was_measured() -> None:
    measured = [{"holdfast.p50_us": 100.0, "echo.p50_us": 100.0, "least.p50_us": 70, "engine.worker_mib": 3.0}]
    lines = to_markdown(a_run((AT_MOST, ALONE), measured)).splitlines()
    call = "| a call | 100 µs | asyncio streams echo 100 µs | 1.00 × | 1.00 – 1.00 | ≤ 1.25 × | 0.70 × | yes |"
    assert lines[2] == call
    assert lines[3] == "| a worker | 3.00 MiB |  |  | 3.00 MiB – 3.00 MiB | ≤ 2.00 MiB |  | **no** |"
    assert lines[-1].startswith("1 of 2 hold; medians of 1 rounds. Measured on 2 cores of a CPU")
    assert "2026-01-02" in lines[-1]


def test_a_run_comes_back_from_its_json_as_it_was() -> None:
    measured = [{"holdfast.p50_us": 1.5, "echo.p50_us": 1.0}, {"holdfast.p50_us": 2.0}]
    speed = a_run((AT_MOST, ALONE), measured, Trouble("echo", 2, "gone"))
    assert msgspec.json.decode(msgspec.json.encode(speed), type=Speed) == speed


def test_the_section_between_the_marks_is_replaced_and_nothing_else() -> None:
    text = f"before\n{BEGIN}\nold \\1\n{END}\nafter\n"
    assert replace_section(text, r"new \1 \g<0>") == f"before\n{BEGIN}\nnew \\1 \\g<0>\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["no marks", f"{BEGIN}\n", f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_text_without_one_section_is_left_alone(text: str) -> None:
    with pytest.raises(ValueError, match="no single section"):
        replace_section(text, "new")


def test_the_readme_tells_what_the_kept_run_measured() -> None:
    kept = msgspec.json.decode((ROOT / "benchmarks" / "results" / "speed.json").read_bytes(), type=Speed)
    readme = (ROOT / "README.md").read_text("utf-8")
    assert replace_section(readme, to_markdown(kept)) == readme, "run: python -m benchmarks.speed --readme"


def test_a_plot_has_a_line_at_what_is_to_be_reached() -> None:
    plot = next(plot for plot in PLOTS if plot.name == "call")
    speed = a_run(checks_of(["call"]), [{"holdfast.p50_us": 90.0, "echo.p50_us": 80.0, "pebble.p50_us": 300.0}])
    assert [value for _, value in limits(plot, speed)] == [100.0, 150.0]
    assert labels(("pebble.p50_us", "holdfast.p50_us")) == ["pebble", "Holdfast"]
    assert labels(("deadline.p50_ms", "deadline.p99_ms")) == ["Holdfast, p50", "Holdfast, p99"]


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 2), (0.75, 3), (0.76, 4), (0.99, 4), (1.0, 4)])
def test_a_percentile_is_a_value_that_was_measured(share: float, value: float) -> None:
    assert percentile([4, 1, 3, 2], share) == value


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.5)])
def test_a_percentile_of_nothing_or_past_everything_is_refused(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match=r"no values|a share"):
        percentile(values, share)


def test_a_folder_of_the_kernel_is_on_the_kernels_file_system() -> None:
    assert file_system(Path("/proc/self")) == "proc"
