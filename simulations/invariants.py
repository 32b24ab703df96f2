"""What must hold: asked after every event of every host, and at the end.

Owns: the sentences that a run is judged by. Must not: change anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fieldmesh.core.model import Member, NodeState, Row
from simulations.faults import Playground
from simulations.node import mesh_of, node_id
from simulations.serving import ServingNode
from simulations.world import Host, InvariantBroken

if TYPE_CHECKING:
    from simulations.scenario import Scenario

TOLD_OF_DEAFNESS_S = 0.1
"""On top of the time to notice: the other side has to say that it does not hear us."""
STALE_MESSAGES_S = 0.6
"""Duplicates and reordered messages may come this late, and look like signs of life."""

JUDGE_INTERVAL_S = 0.05


class Watch:
    """Judges one run."""

    def __init__(self, scenario: Scenario, ground: Playground) -> None:
        self.scenario = scenario
        self.ground = ground
        self.world = ground.world
        self._quiet_at = scenario.virtual_s - scenario.settle_s
        self._stamps: dict[tuple[str, int, str], tuple[int, int]] = {}
        self._judged: dict[str, tuple[object, float]] = {}
        self._believed_since: dict[tuple[str, int, str], float] = {}

    def after_event(self, host: Host) -> None:
        """Raises AssertionError where this host's node believes what it must not."""
        mesh = mesh_of(host.machine)
        if mesh.membership.left:
            return
        now, view = self.world.time, mesh.view
        judged = self._judged.get(host.label)
        if judged is not None and judged[0] is view and now - judged[1] < JUDGE_INTERVAL_S:
            return  # the same belief, judged just now
        self._judged[host.label] = (view, now)
        calm_since = self._calm_since(host.label)
        for member in view.members:
            label = self.ground.ids.get(member.id)
            assert label is not None, f"knows a node that never lived: {member.name} {member.id}"
            if member.row is not None:
                self._row_only_advances(host, member.row)
            if label == host.label:
                continue
            believed = (host.label, host.boots, member.id)
            if member.state is NodeState.DEAD:
                self._believed_since.pop(believed, None)
            if member.state is NodeState.ALIVE:
                # Where nobody beats to everybody, one that has just come is told of one that has just gone.
                self._believed_since.setdefault(believed, now)
                if self.scenario.checks_notice:
                    self._must_notice(host, label, member, now)
            elif self.scenario.checks_alive:
                self._must_not_accuse(host, label, member, now, calm_since)

    def at_end(self) -> None:
        """Everybody who lives agrees on everything. Raises InvariantBroken."""
        meshes = {
            label: mesh_of(host.machine)
            for label, host in self.world.hosts.items()
            if host.machine is not None
        }
        names = {self.ground.settings[label].name for label in meshes}
        marks = set()
        self._all_answered()
        for label, mesh in meshes.items():
            states = {m.name: m.state.value for m in mesh.view.members if m.id in self._current_ids()}
            missing = names - states.keys()
            self._require(not missing, f"{label} does not know {sorted(missing)} at the end")
            not_alive = {name: state for name, state in states.items() if state != "alive"}
            self._require(not not_alive, f"{label} takes {not_alive} for dead at the end")
            marks.add(mesh.replica.mark)
            for member in mesh.view.members:
                other = self.ground.ids[member.id]
                if member.id not in self._current_ids():
                    continue
                offered = self.ground.settings[other].profiles
                self._require(member.row is not None, f"{label} has no row of {other} at the end")
                assert member.row is not None
                fresh = member.row.profiles == offered and member.row.incarnation == member.incarnation
                self._require(fresh, f"{label} has an old row of {other} at the end: {member.row}")
                self._require(
                    set(member.row.addresses) == set(self.world.hosts[other].addresses),
                    f"{label} has old addresses of {other} at the end",
                )
        self._require(len(marks) == 1, f"directories differ at the end: {marks}")

    def _all_answered(self) -> None:
        """Every ask of a living entry node has ended, and no engine works for nobody."""
        waiting = sorted(self.ground.ledger.open)
        self._require(not waiting, f"never ended: {waiting[:5]}")
        for label, host in self.world.hosts.items():
            if isinstance(host.machine, ServingNode):
                batcher = host.machine.serving.batcher
                load = batcher.load()
                self._require(load.running + load.queued == 0, f"{label} still works for nobody: {batcher!r}")

    def _row_only_advances(self, host: Host, row: Row) -> None:
        """A node never shows an older row of an author than it has shown before in this life."""
        key = (host.label, host.boots, row.id)
        stamp = (row.incarnation, row.sequence)
        assert stamp >= self._stamps.get(key, (0, 0)), f"went back to an older row of {row.name}"
        self._stamps[key] = stamp

    # --- inside ----------------------------------------------------------------------------

    def _current_ids(self) -> set[str]:
        return {node_id(settings.key) for settings in self.ground.settings.values()}

    def _require(self, holds: bool, sentence: str) -> None:
        if not holds:
            raise InvariantBroken(f"t={self.world.time:.6f} {sentence}")

    def _calm_since(self, label: str) -> float:
        """When this host's last own trouble ended."""
        return self.ground.trouble_until.get(label, 0.0)

    def _must_notice(self, host: Host, label: str, member: Member, now: float) -> None:
        """Nobody who was dead, frozen or cut off for ``notice_s`` is taken for alive."""
        down = self.ground.down_since.get(label)
        cut = self.ground.cut_since.get((label, host.label))
        deaf = self.ground.cut_since.get((host.label, label))
        # A cut tells nothing new of a node that comes back behind it: others say that it is there.
        back_at = (
            max(self._calm_since(label), self.ground.frozen_until.get(label, 0.0)) if down is None else 0.0
        )
        since = min((max(time, back_at) for time in (down, cut) if time is not None), default=None)
        if since is None and deaf is not None:  # it learns of that from what the other side says
            since = max(deaf, back_at) + TOLD_OF_DEAFNESS_S
        if since is None:
            return
        if self.ground.ids.get(member.id) == label and member.id != node_id(self.ground.settings[label].key):
            return  # an earlier identity of that box
        watching_since = max(
            since,
            self._calm_since(host.label),
            self.ground.frozen_until.get(host.label, 0.0),
            self._believed_since[host.label, host.boots, member.id],
        )
        allowed_s = self.scenario.notice_s + STALE_MESSAGES_S * bool(self.scenario.link.duplicate)
        if self.scenario.late_nodes:
            allowed_s += 4 * self.scenario.late_s_max
        assert now - watching_since <= allowed_s, (
            f"takes {label} for alive {now - since:.3f} s after it went down or was cut off"
        )

    def _must_not_accuse(self, host: Host, label: str, member: Member, now: float, calm_since: float) -> None:
        """Nobody healthy is taken for dead, once all trouble between the two is long over."""
        if label in self.ground.down_since or member.id != node_id(self.ground.settings[label].key):
            return
        if (label, host.label) in self.ground.cut_since or (host.label, label) in self.ground.cut_since:
            return
        accused = member.state in (NodeState.SUSPECT, NodeState.DEAD)
        calm_since = max(
            calm_since,
            0.0
            if accused
            else self.ground.frozen_until.get(host.label, 0.0),  # who was frozen accuses nobody
            self._calm_since(label),
            self.ground.frozen_until.get(label, 0.0),
            self.ground.pair_trouble_until.get((label, host.label), 0.0),
        )
        assert now - calm_since <= self.scenario.patience_s, (
            f"takes {label} for {member.state.value}, though both are well for {now - calm_since:.1f} s"
        )
