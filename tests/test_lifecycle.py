"""Contract 2: five states, one table, one way."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import Cause, IllegalTransition, ReasonCode
from engine.lifecycle import diagram
from engine.lifecycle.machine import Lifecycle
from engine.lifecycle.states import EXPLAINED, FINAL, TRANSITIONS, State, Trigger
from events.envelope import PluginFacts, Transition

pytestmark = pytest.mark.contract(2)

CAUSE = Cause(ReasonCode.TOOL_EXCEPTION, "it broke; mend it")
LEGAL = {(source, row.trigger): row.dest for row in TRANSITIONS for source in row.sources}
PATHS: dict[State, tuple[Trigger, ...]] = {
    State.LOADED: (),
    State.INITIALIZED: (Trigger.INITIALIZE,),
    State.RUNNING: (Trigger.INITIALIZE, Trigger.RUN),
    State.FAILED: (Trigger.FAIL,),
    State.UNAVAILABLE: (Trigger.BECOME_UNAVAILABLE,),
}


def cause_for(trigger: Trigger) -> Cause | None:
    return CAUSE if trigger in (Trigger.FAIL, Trigger.BECOME_UNAVAILABLE) else None


def lifecycle_in(state: State, events: list[Transition]) -> Lifecycle:
    lifecycle = Lifecycle(1, PluginFacts(), events.append)
    for trigger in PATHS[state]:
        lifecycle.fire(trigger, cause_for(trigger))
    return lifecycle


def test_there_are_exactly_the_five_states() -> None:
    assert [state.value for state in State] == ["LOADED", "INITIALIZED", "RUNNING", "FAILED", "UNAVAILABLE"]


@pytest.mark.parametrize(("state", "trigger"), list(itertools.product(State, Trigger)))
def test_a_trigger_does_what_the_table_says_and_nothing_else(state: State, trigger: Trigger) -> None:
    events: list[Transition] = []
    lifecycle = lifecycle_in(state, events)
    before, published = lifecycle.status, len(events)
    if (state, trigger) in LEGAL:
        after = lifecycle.fire(trigger, cause_for(trigger))
        assert after.state is LEGAL[state, trigger]
        assert events[-1].from_ == state.value
        assert events[-1].to == after.state.value
        assert events[-1].trigger == trigger.value
    else:
        with pytest.raises(IllegalTransition, match=state.value):
            lifecycle.fire(trigger, cause_for(trigger))
        assert lifecycle.status is before
        assert len(events) == published


@pytest.mark.parametrize("state", sorted(FINAL))
def test_nothing_leads_out_of_a_final_state(state: State) -> None:
    lifecycle = lifecycle_in(state, [])
    assert not any(lifecycle.fire_if(trigger, cause_for(trigger)) for trigger in Trigger)
    assert lifecycle.status.state is state


@pytest.mark.parametrize("trigger", list(Trigger))
def test_a_cause_belongs_to_failed_and_unavailable_alone(trigger: Trigger) -> None:
    lifecycle = Lifecycle(1, PluginFacts(), lambda _: None)
    wrong = None if cause_for(trigger) else CAUSE
    with pytest.raises(ValueError, match="cause"):
        lifecycle.fire(trigger, wrong)
    assert lifecycle.status.state is State.LOADED


@pytest.mark.parametrize("attribute", ["to_RUNNING", "to_LOADED"])
def test_there_is_no_back_door_into_a_state(attribute: str) -> None:
    assert not hasattr(Lifecycle(1, PluginFacts(), lambda _: None), attribute)


@given(st.lists(st.sampled_from(Trigger), max_size=8))
def test_any_sequence_of_triggers_leaves_a_state_that_its_events_tell(triggers: list[Trigger]) -> None:
    events: list[Transition] = []
    lifecycle = Lifecycle(7, PluginFacts(), events.append)
    for trigger in triggers:
        lifecycle.fire_if(trigger, cause_for(trigger))
        status = lifecycle.status
        assert events[-1].to == status.state.value
        assert (status.cause is not None) == (status.state in EXPLAINED)
        assert status.incarnation == 7
    chain: list[Any] = [None, *[event.to for event in events]]
    assert [event.from_ for event in events] == chain[:-1]
    assert len(set(chain)) == len(chain), "a state was visited twice"


def test_the_lifecycle_page_shows_the_machine_that_runs() -> None:
    page = Path(__file__).parents[1] / "docs" / "lifecycle.md"
    assert page.read_text() == diagram.page(), "run: python -m engine.lifecycle.diagram > docs/lifecycle.md"
