"""Room for who is urgent: who must give way, where the policy is "priority"."""

from jaxengine.scheduler.roster import Roster
from jaxengine.scheduler.sequence import Sequence, Status


def make_room(roster: Roster) -> bool:
    """Preempts those who are less urgent than the next one by the threshold, until that has room.

    Nobody is preempted in vain. False when tokens of a victim must be read first.
    """
    if not roster.policy.has_priorities or not roster.waiting:
        return True
    newcomer = roster.in_order()[0]
    while (victim := _victim(roster, newcomer)) is not None:
        if victim.num_in_flight:
            return False
        if victim.status is Status.WAITING:
            roster.take_slots(victim)
        else:
            roster.preempt(victim, keeps_slots=roster.has_slots(newcomer))
    return True


def _victim(roster: Roster, newcomer: Sequence) -> Sequence | None:
    """Who goes next; None when the newcomer has room, or would not get it."""
    lesser = [s for s in roster.running if roster.policy.may_preempt(newcomer, s)]
    idle = [s for s in roster.waiting if s.was_started and roster.policy.may_preempt(newcomer, s)]
    needed = roster.pages_to_start(newcomer, roster.match(newcomer)) + roster.reserved_pages()
    missing = needed - roster.cache.num_available
    gain = sum(_num_pages(s) + roster.pages_ahead(s) for s in lesser)
    if missing > gain:
        return None
    if not roster.has_slots(newcomer):
        givers = [s for s in lesser + idle if s.leader.slot is not None and not s.is_bound_to_slots]
        num_free = roster.num_free_slots + sum(len(s.members) for s in givers)
        if newcomer.num_slots_wanted > num_free:
            return None
        return max(givers, key=roster.policy.rank)
    return max(lesser, key=roster.policy.rank) if missing > 0 else None


def _num_pages(sequence: Sequence) -> int:
    return sum(len(member.pages) for member in sequence.members)
