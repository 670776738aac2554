"""Which fault strikes where: a kill at every point of every step, the other faults at every point that they are about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from faults.world import STEPS, At, World

# Round 1 stands for the rounds: it takes a policy, a trainer's state and stored verdicts from the round before.
DISTURBED = tuple(step for step in STEPS if not step.endswith(" 0"))
Case = tuple[str, At, str]
DONE = ("shard stored", "step saved", "stage finished")
# Where it makes a difference how often it has happened before.
REPEATED = ("sampled", "shard stored", "step saved", "committed")
TURNS = 3
FAULTS = {
    "kill": "SIGKILL at the point",
    "torn": "the file, or the largest of the folder, holds its first half; SIGKILL",
    "lost": "power fails: content and names are as of their last fsync",
    "emptied": "power fails: names are as they were, content as of its last fsync",
    "flipped": "a byte of what was finished is another one; SIGKILL",
    "full": "the disk is full from the point on (ENOSPC)",
    "read-only": "the disk is read-only from the point on (EROFS)",
    "clock": "the clock goes back by an hour, files are from the future; no kill",
    "group": "SIGKILL of all processes of the run, a second after the point: of `papo run` while `dvc commit` runs",
}
AT: dict[str, tuple[str, ...]] = {
    "torn": ("written", *DONE),
    "lost": ("renamed", *DONE),
    "emptied": ("renamed", *DONE),
    "flipped": DONE,
    "full": ("mkdir", "write", "link"),
    "read-only": ("mkdir", "write", "rename", "remove", "link"),
    "clock": ("stage begins", *DONE),
}


def places(world: World, step: str) -> Iterator[At]:
    """Of each point of a step the first file that it is about and the last, of those that matter again each, with the last time, too."""
    for where in ("start", step, "end"):
        labels: dict[str, list[tuple[str, int]]] = {}
        for (point, label), times in world.traces[step].classes(where).items():
            labels.setdefault(point, []).append((label, times))
        for point, found in labels.items():
            for label, times in found if point in REPEATED else dict.fromkeys((found[0], found[-1])):
                yield At(where, point, label, 1)
                if times > 1 and point in REPEATED:
                    # How many answers share a transaction goes by the pace: another run of the same work may need fewer of them.
                    yield At(where, point, label, times // 2 if point == "committed" else times)


def every_case(world: World) -> Iterator[Case]:
    """Step, place and fault of all that there are: minutes by the dozen."""
    for step in DISTURBED:
        for at in places(world, step):
            yield step, at, "kill"
            for fault, points in AT.items():
                if at.point not in points or (fault == "torn" and ("(new)" in at.label or at.step == "start")):
                    continue
                yield step, at, fault
                if fault in ("torn", "flipped") and at.point == "stage finished":
                    for output in world.outputs[step]:
                        yield step, replace(at, victim=output), fault


def cases(world: World) -> list[Case]:
    """Of `every_case` those that are run: each point of each step is killed at, the other faults take turns among the steps.

    A kill is at the first file that a point of the step is about, in every other step at the last; both in round 1's rollout, and the
    first and last time of those that repeat. Any other fault strikes at each of its points in every third step that has it.
    """
    turns: dict[tuple[str, str], dict[str, list[Case]]] = {}
    for case in every_case(world):
        step, at, fault = case
        turns.setdefault((fault, at.point), {}).setdefault(step, []).append(case)
    chosen = []
    for turn, ((fault, point), by_step) in enumerate(turns.items()):
        steps = list(by_step)
        if fault != "kill":
            steps = steps[turn % min(TURNS, len(steps)) :: TURNS]
        for step in steps:
            # What the lock and its note are to a step, they are to every other.
            found = [case for case in by_step[step] if case[1].step == step] or by_step[step]
            last = (turn + DISTURBED.index(step)) % 2
            if fault == "kill" and step == "rollout 1":
                chosen += by_step[step]
            elif point in REPEATED and fault == "kill":
                chosen += [found[0], found[-1]] if len(found) > 1 else found
            else:
                chosen.append(found[-1 if last else 0])
    return sorted(chosen, key=lambda case: DISTURBED.index(case[0]))
