"""The lifecycle of one incarnation of a plugin, enforced by one `transitions` machine for all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
from transitions import Machine, MachineError

from engine.errors import Cause, IllegalTransition
from engine.lifecycle.states import ENTRY, EXPLAINED, TRANSITIONS, State, Trigger
from events.envelope import PluginFacts, Transition

Publish: TypeAlias = Callable[[Transition], Any]


class Status(msgspec.Struct, frozen=True):
    """Where a plugin stands; swapped whole, so no reader ever sees half of a change."""

    state: State
    incarnation: int
    cause: Cause | None = None  # set iff the state is FAILED or UNAVAILABLE


class Lifecycle:
    """One incarnation's state. Any thread may fire a trigger or read `status`.

    Args:
        incarnation: 1 for the first life of a plugin, one more for each restart.
        facts: what its manifest says, published with the entry at LOADED.
        publish: takes each transition, in the order in which they happened.
    """

    def __init__(self, incarnation: int, facts: PluginFacts, publish: Publish) -> None:
        self._lock = threading.Lock()
        self._publish = publish
        self._cause: Cause | None = None
        self._over = False
        self.status = Status(ENTRY, incarnation)  # read without a lock; set by the machine alone
        publish(Transition(None, ENTRY.value, None, incarnation, plugin=facts))

    @property
    def state(self) -> State:
        """The model attribute that the machine reads and sets."""
        return self.status.state

    @state.setter
    def state(self, state: State | str) -> None:
        # Called by the machine alone, inside `fire`: the state and its cause change in one assignment.
        self.status = Status(State(state), self.status.incarnation, self._cause)

    def fire(self, trigger: Trigger, cause: Cause | None = None) -> Status:
        """Change the state by the table and publish the change.

        Args:
            trigger: which row of the table.
            cause: why; required for FAILED and UNAVAILABLE, refused for the others.

        Raises:
            IllegalTransition: the table has no such row from the present state; nothing was changed.
            ValueError: a cause is missing, or given where there is none.
        """
        row = _ROWS[trigger]
        if (cause is not None) != (row.dest in EXPLAINED):
            raise ValueError(
                f"{trigger.value} leads to {row.dest.value}: a cause belongs to FAILED and UNAVAILABLE"
            )
        with self._lock:
            if self._over:
                raise IllegalTransition(f"incarnation {self.status.incarnation} is over; a later one has begun")
            before = self.status
            self._cause = cause
            try:
                MACHINE.events[trigger.value].trigger(self)
            except MachineError:
                raise IllegalTransition(
                    f"a plugin that is {before.state.value} cannot {trigger.value}; "
                    f"only {', '.join(source.value for source in row.sources)} can"
                ) from None
            finally:
                self._cause = None
            after = self.status
            # Published under the lock: the order of the events is the order of the changes.
            self._publish(
                Transition(
                    before.state.value,
                    after.state.value,
                    trigger.value,
                    after.incarnation,
                    None if cause is None else cause.reason_code.value,
                    None if cause is None else cause.reason,
                )
            )
            return after

    def end(self) -> None:
        """A restart: this incarnation stays as it is, and publishes nothing more."""
        with self._lock:
            self._over = True

    def fire_if(self, trigger: Trigger, cause: Cause | None = None) -> bool:
        """`fire`, unless another thread or an earlier fault was first; says whether it changed the state."""
        try:
            self.fire(trigger, cause)
        except IllegalTransition:
            return False
        return True


_ROWS = {row.trigger: row for row in TRANSITIONS}

# One synchronous machine for every plugin. It holds the table alone: models are passed per trigger, never
# registered, so it keeps no reference to a plugin that is gone.
MACHINE = Machine(
    model=None,
    states=[state.value for state in State],
    transitions=[
        {"trigger": row.trigger.value, "source": [s.value for s in row.sources], "dest": row.dest.value}
        for row in TRANSITIONS
    ],
    initial=None,
    auto_transitions=False,
    send_event=False,
)
