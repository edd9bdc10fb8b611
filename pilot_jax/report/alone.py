"""Finds what each client reaches by training alone, and says in words whom a run has helped."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from pilot_jax.config import Config, differences
from pilot_jax.errors import InputError
from pilot_jax.report.record import RunRecord, read_run
from pilot_jax.runs.folder import FREE
from pilot_jax.runs.manifest import has_ended, run_config
from pilot_jax.words import change, counted, decimal, listed

LOCAL = "local"  # the strategy whose clients train alone
SAME = 1e-9  # scores that differ by less are equal
MOST_FOLDERS = 500  # most folders beside a run that are looked into


@dataclasses.dataclass(frozen=True)
class Alone:
    """The scores of clients that trained alone, and the run that has them."""

    name: str
    scores: Mapping[str, float]
    differs: Sequence[str] = ()  # keys in which its config differs from the run's, strategy and machine apart


@dataclasses.dataclass(frozen=True)
class Gains:
    """The difference of each client's score to a reference, over the clients that both have."""

    by_client: Mapping[str, float]

    @property
    def mean(self) -> float:
        return sum(self.by_client.values()) / len(self.by_client)

    def gained(self) -> list[str]:
        """Returns the clients with a higher score, the largest gain first."""
        return sorted((c for c, v in self.by_client.items() if v > SAME), key=lambda c: -self.by_client[c])

    def lost(self) -> list[str]:
        """Returns the clients with a lower score, the largest loss first."""
        return sorted((c for c, v in self.by_client.items() if v < -SAME), key=lambda c: self.by_client[c])


def differing_keys(own: Config, its: Config) -> list[str]:
    """Returns the keys in which two configs differ, without those of the strategy and of the machine."""
    lines = [line for line in differences(own, its) if not line.startswith(("strategy.", *FREE))]
    return [line.split(":", 1)[0] for line in lines]


def find_alone(run: RunRecord, given: Sequence[RunRecord]) -> Alone | None:
    """Returns the finished run of strategy local that shows what `run` has gained; None if there is none.

    A run of `given` may differ in its config, since the user chose it. Otherwise the folders beside the run's are
    looked at, and the config must be the same but for the strategy and the machine.
    """
    if run.strategy == LOCAL or not run.summary:
        return None
    config = run_config(run.folder)
    found = [Alone(other.name, other.summary["score_by_client"], differing_keys(config, run_config(other.folder)))
             for other in given if other is not run and other.strategy == LOCAL and other.summary]
    found = [one for one in found if set(one.scores) & set(run.summary["score_by_client"])]
    return min(found, key=lambda one: len(one.differs)) if found else _beside(run, config)


def _beside(run: RunRecord, config: Config) -> Alone | None:
    """Returns the newest run of the same config under strategy local in the folders beside a run's."""
    try:
        folders = [f for f in run.folder.resolve().parent.iterdir() if (f / "summary.json").is_file()]
    except OSError:
        return None
    for folder in sorted(folders, key=lambda f: -(f / "summary.json").stat().st_mtime)[:MOST_FOLDERS]:
        try:
            if folder.samefile(run.folder) or not _is_local(folder) or not has_ended(folder):
                continue
            if not differing_keys(config, run_config(folder)):
                other = read_run(folder)
                return Alone(other.name, other.summary["score_by_client"]) if other.summary["score_by_client"] else None
        except (InputError, OSError):  # another run's damage is no matter of this page
            continue
    return None


def _is_local(folder: Path) -> bool:
    try:
        return bool(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["strategy"]["name"] == LOCAL)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, RecursionError):
        return False


def gains(scores: Mapping[str, float], reference: Mapping[str, float]) -> Gains | None:
    """Returns the gains of the clients that have both scores; None if there are none."""
    both = {c: v - reference[c] for c, v in scores.items() if c in reference}
    return Gains(both) if both else None


def outcome(found: Gains, over: str) -> str:
    """Returns in words how many clients gained and lost against a reference, and who most."""
    up, down, total = found.gained(), found.lost(), len(found.by_client)
    same = total - len(up) - len(down)
    if not up and not down:
        return f"No client gained or lost anything over {over}."
    parts = [f"{len(up)} of {counted(total, 'client')} gained over {over}" if up else
             f"None of {counted(total, 'client')} gained over {over}"]
    if down:
        parts.append(f"{len(down)} lost")
    if same:
        parts.append(f"{same} stayed the same")
    text = f"{listed(parts)} (mean {change(found.mean)}"
    if up:
        text += f"; best: {up[0]} {change(found.by_client[up[0]])}"
    if down:
        text += f"; worst: {down[0]} {change(found.by_client[down[0]])}"
    return text + ")."


def verdict(run: RunRecord, alone: Alone | None, prompts: Mapping[str, int]) -> list[str]:
    """Returns what happened in a run in sentences, the most important first.

    Args:
        prompts: number of test prompts by client, as far as it is known.
    """
    rounds = len({p["round"] for p in run.phases})
    what = (f"{counted(len(run.task_of), 'client')} with {counted(len(run.tasks), 'task')} trained for "
            f"{counted(rounds, 'round')} with the strategy {run.strategy}")
    if not run.summary:
        return [f"This run has not ended yet: so far, {what}. It has no test scores until it ends."]
    if run.summary.get("deployed"):
        return [f"{what}, each client on a machine of its own. The server has no data and so no scores."]
    if not run.summary["score_by_client"]:
        return [f"{what}. The data have no test samples, so nobody can say how good the models are. Name the split "
                "of samples, or set data.hold_out.test, such as 0.1."]
    s = run.summary
    out = [f"{what}: on their own test data, their models score {decimal(s['score_mean'], 2)} on average, the base "
           f"model before training {decimal(s['score_base'], 2)}."]
    without = [c for c in run.task_of if c not in s["score_by_client"]]
    if without:
        out.append(f"{listed(without)} {'has' if len(without) == 1 else 'have'} no test data, and so no score.")
    if s.get("best_round") is not None:
        out.append(f"The models are those of round {s['best_round']}, which scored best on validation data.")
    if run.strategy == LOCAL:
        out.append("Each client trained alone; a run of the same config with another strategy shows whether federating "
                   "helps.")
    over_alone = gains(s["score_by_client"], alone.scores) if alone is not None else None
    if alone is not None and over_alone is not None:
        out.insert(0, outcome(over_alone, "training alone"))
        if alone.differs:
            out.append(f"The run that trained alone, {alone.name}, has another config: "
                       f"{listed(list(alone.differs), 6)}. The gains are of both changes together.")
    elif run.strategy != LOCAL:
        over_base = gains(s["score_by_client"], s["score_base_by_client"])
        out += [outcome(over_base, "the base model")] if over_base is not None else []
        out.append("Whether federating helped cannot be seen in this run alone: it takes a second one, of the same "
                   "config with --set strategy.name=local, in a folder beside this one.")
    if prompts and min(prompts.values()) < 200:
        low, high = min(prompts.values()), max(prompts.values())
        each = counted(low, "test prompt") if low == high else f"{low} to {high} test prompts"
        out.append(f"A client has {each}: one answer more or less is {1 / low:.2f} of its score"
                   f"{'' if low == high else ' at most'}. This is one seed; several seeds tell luck from effect "
                   "(pilot-jax compare).")
    return out


def command_for_alone(run: RunRecord) -> str:
    """Returns the command that trains the same clients alone."""
    return shlex.join(["pilot-jax", "run", str(run.folder / "config.yaml"), "--set", f"strategy.name={LOCAL}", "--out",
                       str(run.folder.parent / f"{run.name}-{LOCAL}")])
