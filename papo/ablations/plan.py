"""Ablation plans: a grid over params times seeds, what is compared, and the claims that it tests. docs/ablations.md

A plan is a YAML file such as infra/ablations/claims.yaml:

    title: What the process reward adds
    base: {run.rounds: 40}                       # laid over params.yaml
    seeds: 5                                     # values of run.seed: 0 to 4, or a list
    axes:                                        # an arm is one label of each axis
      variant: {orm: {advantage.variant: orm}, papo: {advantage.variant: papo}}
      rollout.group_size: [4, 8]                 # of one param: its values are the labels
    compare:
    - {against: {variant: orm}, measures: [accuracy/sums-hard, length/sums-hard]}
    margins: {accuracy: 0.02, length: 2}         # what is too small to matter, by measure or by its first word
    claims:
    - says: PAPO ends above ORM
      needs:
      - {measure: accuracy/sums-hard, arm: {variant: papo, rollout.group_size: 8}, against: {variant: orm}, is: higher}
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from papo.errors import ParamsError
from papo.params import Params, load_params
from papo.pipeline import lineage

PLANS = Path("infra/ablations")

Labels = dict[str, Annotated[str, BeforeValidator(lambda value: label_of(value))]]
"""One label of an axis, or of several, by axis; a number is the label of its value."""

Override = dict[str, Any]
"""Values by the dotted name of a param."""

KINDS = {
    "accuracy": "benchmark",
    "gain": "benchmark",
    "fall": "benchmark",
    "length": "benchmark",
    "first": "signal",
    "last": "signal",
    "mean": "signal",
    "change": "signal",
    "verdicts": None,
}
"""First words of measures, and what comes after the slash; papo/ablations/measures.py says what each is."""

UNUSED: tuple[tuple[Override, tuple[str, ...]], ...] = (
    ({"advantage.variant": "orm"}, ("score_prm.", "advantage.lam", "advantage.missing", "advantage.length_")),
    ({"advantage.variant": "prm"}, ("advantage.lam",)),
    ({"advantage.variant": "mult"}, ("advantage.lam",)),
    (
        {"advantage.variant": "papo", "advantage.lam": 0},
        ("advantage.guard",),
    ),  # the outcome alone has no order to guard
)
"""Params that are not looked at where others are so: runs that differ in them alone are one run."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _measure(name: str) -> str:
    kind, slash, rest = name.partition("/")
    if kind not in KINDS:
        raise ValueError(f"{name!r} is no measure: it begins with one of {', '.join(KINDS)}")
    if bool(slash and rest) != (KINDS[kind] is not None):
        raise ValueError(f"{name!r} is no measure: write {kind}/<{KINDS[kind]}>" if KINDS[kind] else f"write {kind}")
    return name


class Comparison(_Part):
    """Arms that have the labels `arms` (all of them, without), each against the arm that differs in the labels `against` alone."""

    measures: list[str] = Field(min_length=1)
    against: Labels = Field(min_length=1)
    arms: Labels = {}

    _check = field_validator("measures")(lambda names: [_measure(name) for name in names])


class Need(_Part):
    """One thing that has to be so for a claim to hold: an arm's measure, or its difference from another arm's, is what."""

    measure: str
    arm: Labels
    against: Labels | None = None
    is_: Literal["higher", "lower", "same", "not lower", "not higher"] = Field(alias="is")
    margin: float | None = Field(None, gt=0.0, description="What is too small to matter; null: as `margins` say.")

    _check = field_validator("measure")(_measure)


class Claim(_Part):
    """What somebody says, and what has to be measured for it to hold. `paper`: the published figures, if it is the paper's."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    says: str
    paper: str = ""
    note: str = ""
    needs: list[Need] = Field(min_length=1)


class Scaling(_Part):
    """A fit of log L = -k(N) log X + E(N) along the rounds of each size (arXiv 2509.25300): L is 1 - accuracy, X the responses seen."""

    benchmark: str
    size: str = Field(description="The axis whose labels are sizes.")


class Plan(_Part):
    """A whole plan, as its file has it."""

    title: str
    about: str = ""
    preset: str | None = None
    base: Override = {}
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(min_length=1)
    axes: dict[str, dict[str, Override]] = Field(min_length=1)
    leave_out: list[Labels] = []
    compare: list[Comparison] = []
    margins: dict[str, Annotated[float, Field(gt=0.0)]] = {}
    curves: list[str] = Field(
        ["accuracy", "zero_advantage_share", "length_mean"], description="Signals drawn by round."
    )
    along: str | None = Field(None, description="An axis of numbers, which final accuracies are drawn along.")
    claims: list[Claim] = []
    scaling: Scaling | None = None
    confidence: float = Field(0.95, gt=0.5, lt=1.0)

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("axes", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            name: {label_of(item): {name: item} for item in axis} if isinstance(axis, list) else axis
            for name, axis in value.items()
        }

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("a seed is named twice")
        for name, axis in self.axes.items():
            if not axis:
                raise ValueError(f"axes.{name} has no labels")
        whole: list[tuple[str, Labels | None]] = [("leave_out", one) for one in self.leave_out]
        for number, one in enumerate(self.compare):
            whole += [(f"compare.{number}.against", one.against), (f"compare.{number}.arms", one.arms)]
        for claim in self.claims:
            for need in claim.needs:
                where = f"claims.{claim.name}: {need.measure}"
                whole += [(where, need.arm), (where, need.against)]
                if need.is_ == "same" and self.margin(need.measure, need.margin) is None:
                    raise ValueError(f"{where}: `same` needs a margin, here or in margins")
        for where, labels in whole:
            for axis_name, label in (labels or {}).items():
                if axis_name not in self.axes:
                    raise ValueError(f"{where}: there is no axis {axis_name!r}; axes: {', '.join(self.axes)}")
                if label not in self.axes[axis_name]:
                    known = ", ".join(self.axes[axis_name])
                    raise ValueError(f"{where}: axis {axis_name} has no label {label!r}; labels: {known}")
        if self.along is not None and self.along not in self.axes:
            raise ValueError(f"along: there is no axis {self.along!r}; axes: {', '.join(self.axes)}")
        if self.scaling is not None and self.scaling.size not in self.axes:
            raise ValueError(f"scaling.size: there is no axis {self.scaling.size!r}")
        for name in self.margins:
            if name not in KINDS:
                _measure(name)
        return self

    def margin(self, measure: str, own: float | None = None) -> float | None:
        """What is too small to matter: a need's own, that of the measure, or of its first word."""
        return own or self.margins.get(measure) or self.margins.get(measure.partition("/")[0])

    @cached_property
    def arms(self) -> list[Arm]:
        """All of them, in the order of the axes."""
        choices = [[(name, label) for label in axis] for name, axis in self.axes.items()]
        every = [dict(labels) for labels in itertools.product(*choices)]
        return [self._arm(labels) for labels in every if not any(within(out, labels) for out in self.leave_out)]

    def _arm(self, labels: Labels) -> Arm:
        overrides = dict(self.base)
        for name, label in labels.items():
            overrides |= self.axes[name][label]
        return Arm(labels, overrides)

    def find(self, labels: Labels, where: str) -> Arm:
        """The one arm that has these labels.

        Raises:
            ParamsError: none, or several.
        """
        found = [arm for arm in self.arms if within(labels, arm.labels)]
        if len(found) != 1:
            named = ", ".join(f"{name}: {label}" for name, label in labels.items())
            fix = "name one label of each axis" if found else "it is left out by leave_out"
            raise ParamsError(f"{len(found)} arms are {named}", where=where, fix=fix)
        return found[0]

    @property
    def digest(self) -> str:
        """Of what it says, however it is written."""
        text = json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Arm:
    """One label of each axis, and the params that they stand for."""

    labels: Labels
    overrides: Override

    @property
    def name(self) -> str:
        """`papo, steps`; with the last word of a param before its value: `lam 0.5, group_size 8`."""
        parts = (f"{axis.rpartition('.')[2]} {label}" if "." in axis else label for axis, label in self.labels.items())
        return ", ".join(parts)


@dataclass(frozen=True)
class Run:
    """One run of the pipeline, which stands for one or more arms at one seed."""

    arms: tuple[Arm, ...]
    seed: int
    overrides: tuple[str, ...]
    params: Params = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """Of its folder; the same whatever the code is."""
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.arms[0].name)}-seed{self.seed}"

    @cached_property
    def lineage(self) -> str:
        return lineage(self.params)

    @property
    def start(self) -> str:
        """Names its problem sets and warm start: runs with the same share them."""
        sections = self.params.model_dump(mode="json", include={"prepare", "warmstart"})
        return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:8]


def read_plan(name: Path | str) -> Plan:
    """A plan by its file, or by the name of one under infra/ablations. Its `extends` names one whose keys it takes over; `base` is merged.

    Raises:
        ParamsError: there is none, or it is not valid; the key is named.
    """
    path, content = _read(name, "PLAN")
    if isinstance(content, dict) and "extends" in content:
        other, parent = _read(str(content.pop("extends")), f"{path}: extends")
        if not isinstance(parent, dict) or "extends" in parent:
            raise ParamsError(
                f"{other} is no plan that another can extend", where=f"{path}: extends", fix="name a whole plan"
            )
        content = {**parent, **content, "base": {**(parent.get("base") or {}), **(content.get("base") or {})}}
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors(include_url=False)]
        raise ParamsError(
            "the plan is not valid:\n" + "\n".join(f"  - {problem}" for problem in problems),
            where=str(path),
            fix="correct the keys named above; infra/ablations/claims.yaml is an example",
        ) from None


def _read(name: Path | str, where: str) -> tuple[Path, Any]:
    path = Path(name)
    if not path.is_file():
        path = PLANS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in PLANS.glob("*.yaml")))
        fix = f"name a YAML file or one of: {known or f'none in {PLANS}'}"
        raise ParamsError(f"there is no ablation plan {str(name)!r}", where=where, fix=fix)
    try:
        return path, yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"not readable as YAML: {error}", where=str(path), fix="correct the file") from None


def _problem(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{key}: {message[:1].lower()}{message[1:]}" if key else message


def expand(plan: Plan, *, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()) -> list[Run]:
    """The runs of a plan, seed by seed, so that whatever ends early has whole comparisons; arms that come to the same run share it.

    Args:
        seeds: those of the plan, unless given.
        overrides: further params for every run, over those of the plan.

    Raises:
        ParamsError: an arm's params are not valid; the arm is named.
    """
    found: dict[tuple[str, ...], tuple[list[Arm], int, Params]] = {}
    for seed in plan.seeds if seeds is None else seeds:
        for arm in plan.arms:
            values = _used(arm.overrides) | {"run.seed": seed}
            given = tuple(f"{key}={json.dumps(value)}" for key, value in sorted(values.items()))
            if given not in found:
                found[given] = ([], seed, _params(plan, arm, (*given, *overrides)))
            found[given][0].append(arm)
    runs = [Run(tuple(arms), seed, (*given, *overrides), params) for given, (arms, seed, params) in found.items()]
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ParamsError(f"two runs would be called {twice}", where="axes", fix="choose labels that differ in letters")
    return runs


def _used(overrides: Override) -> Override:
    unused = tuple(name for where, names in UNUSED if where.items() <= overrides.items() for name in names)
    return {key: value for key, value in overrides.items() if not key.startswith(unused)}


def _params(plan: Plan, arm: Arm, overrides: Sequence[str]) -> Params:
    try:
        return load_params(preset=plan.preset, overrides=overrides)
    except ParamsError as error:
        raise ParamsError(f"arm {arm.name}: {error.what}", where=error.where, fix=error.fix) from None


def pairs(plan: Plan) -> Iterator[tuple[str, Arm, Arm]]:
    """(measure, arm, the arm it is compared with) for every comparison, each once.

    Raises:
        ParamsError: an arm has no counterpart.
    """
    seen = set()
    for number, comparison in enumerate(plan.compare):
        for arm in plan.arms:
            if not within(comparison.arms, arm.labels) or within(comparison.against, arm.labels):
                continue
            other = plan.find(arm.labels | comparison.against, f"compare.{number}")
            for measure in comparison.measures:
                key = (measure, arm.name, other.name)
                if key not in seen:
                    seen.add(key)
                    yield measure, arm, other


def label_of(value: Any) -> str:
    """How a value of a param is written as a label."""
    return value if isinstance(value, str) else json.dumps(value)


def within(some: Labels, labels: Labels) -> bool:
    """Whether labels have all of these."""
    return all(labels.get(name) == label for name, label in some.items())
