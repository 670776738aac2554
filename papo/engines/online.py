"""PAPO online: TRL's GRPOTrainer with the outcome and the process reward kept apart, for people who train without the pipeline.

    trainer = PAPOTrainer(model, args=PAPOConfig(...), train_dataset=dataset, outcome_reward=accuracy, process_reward=judge)

The outcome is asked first, over all processes; the process reward only about the responses whose score the variant uses. Advantages are
those of `papo.core.advantages.compute_advantages`, in place of TRL's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import gather

# At the top, unlike elsewhere: a class needs its base. `papo` imports this module when one of its names is asked for.
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import is_async_callable

from papo.core.advantages import Advantages, compute_advantages, lam_max, process_needed
from papo.core.alarms import Limits, alarms
from papo.core.credit import combine_votes, split_steps, token_advantages, token_steps
from papo.core.groups import BoolArray, FloatArray, IndexArray, as_outcomes
from papo.core.overlong import overlong_penalties
from papo.core.signals import round_signals, verification_flags
from papo.engines.tokenizer import token_starts
from papo.errors import DataError, ParamsError

log = logging.getLogger("papo")

OUTCOME, PROCESS = "outcome", "process"
SCALES = {"group": "std", "none": "mean_only"}

Reward = Any
"""What TRL takes: a function (sync or async), a reward model, or the name of one."""

_Source = tuple[Reward, Any, str]
"""A reward, its processing class and its name."""


@dataclass
class PAPOConfig(GRPOConfig):  # type: ignore[misc]  # TRL is untyped
    """TRL's GRPOConfig and the settings of `compute_advantages`; `scale_rewards` is its scale: "group" divides, "none" does not.

    With `overlong_buffer` the outcome has the penalty of `papo.core.overlong`, by `max_completion_length`; which responses are
    correct stays by the outcome alone.

    Raises:
        ParamsError: a setting that `compute_advantages` or `token_advantages` refuses, or one of TRL's that has no meaning here.
    """

    variant: str = field(default="papo", metadata={"help": "orm, prm, mult, fullnorm, papo, gdpo, convex or capo."})
    lam: float = field(default=1.0, metadata={"help": "Weight of the process advantage."})
    guard: str = field(default="none", metadata={"help": "none, or rank: no correct response falls below a wrong one."})
    advantage_eps: float = field(default=1e-6, metadata={"help": "Added to each std; at or below it a component is 0."})
    w_whole: float = field(default=2.0, metadata={"help": "capo: weight of the outcome in the reward of a token."})
    w_proc: float = field(default=1.0, metadata={"help": "capo: weight of a wrong step in the reward of its tokens."})
    vote: str = field(default="majority", metadata={"help": "capo: how several critiques of a response are combined."})
    overlong_buffer: int | None = field(
        default=None,
        metadata={
            "help": "Tokens before max_completion_length over which a penalty for length rises; None: no penalty."
        },
    )
    overlong_factor: float = field(default=0.5, metadata={"help": "The penalty at max_completion_length."})
    reward_roles: list[str] | None = field(
        default=None, metadata={"help": "The role of each of `reward_funcs`: outcome or process."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unused = "The two rewards are normalised apart and added; `lam` is the weight."
        if self.scale_rewards not in SCALES:
            raise ParamsError(
                f"scale_rewards is {self.scale_rewards!r}",
                where="scale_rewards",
                fix=f"Choose one of {', '.join(SCALES)}.",
            )
        if self.reward_weights is not None:
            raise ParamsError("reward_weights have no effect here", where="reward_weights", fix=unused)
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ParamsError(
                "multi_objective_aggregation has no effect here", where="multi_objective_aggregation", fix=unused
            )
        if self.overlong_buffer is not None and self.max_completion_length is None:
            raise ParamsError(
                "overlong_buffer is the end of a limit, and max_completion_length is None",
                where="overlong_buffer",
                fix="Set max_completion_length.",
            )
        longest = self.penalties([self.max_completion_length])
        if self.variant != "capo":
            compute_advantages([0], [0], [0], penalties=longest, **self.advantage_settings)
            return
        token_advantages([], [], [], [], **self.capo_settings)
        combine_votes([[0]], self.vote)
        if self.guard != "none":
            raise ParamsError(
                f"guard {self.guard!r} has no process advantage to bound in capo, whose debits are by token",
                where="guard",
                fix="Leave it at none: with w_proc <= w_whole no token of a correct response is worth less than one of a wrong one.",
            )

    def penalties(self, lengths: npt.ArrayLike) -> FloatArray | None:
        """(N,) penalties of responses with so many tokens; None without `overlong_buffer`."""
        if self.overlong_buffer is None:
            return None
        return overlong_penalties(lengths, self.max_completion_length, self.overlong_buffer, self.overlong_factor)

    @property
    def advantage_settings(self) -> dict[str, Any]:
        """As `compute_advantages` takes them."""
        return {
            "variant": self.variant,
            "lam": self.lam,
            "scale": SCALES[self.scale_rewards],
            "eps": self.advantage_eps,
            "guard": self.guard,
        }

    @property
    def capo_settings(self) -> dict[str, Any]:
        """As `token_advantages` takes them."""
        return {
            "w_whole": self.w_whole,
            "w_proc": self.w_proc,
            "scale": SCALES[self.scale_rewards],
            "eps": self.advantage_eps,
        }


class _Scored(NamedTuple):
    """A generation batch over all processes: (N,) arrays, NaN where there is no score; `debits`, in `capo` only, as in `_Critic`."""

    orm: FloatArray
    prm: FloatArray
    asked: BoolArray
    lengths: FloatArray
    truncated: BoolArray
    verifies: BoolArray
    debits: FloatArray | None


class PAPOTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is untyped
    """TRL's GRPOTrainer with decoupled advantages (arXiv 2603.26535, Eq. 3-5).

    Rewards are those of TRL: called with prompts, completions, completion_ids and the columns of the data set as lists; sync or async;
    or a reward model. The outcome reward gives 0 or 1, or None where there is no verdict. The process reward gives any finite number, or
    None where the judge failed: missing, never 0. It is called with the responses whose score the variant uses and no others, on each
    process with its own, and not at all where there are none; a reward model as process reward reads all and is masked.

    In `capo` the process reward gives, for each response, the numbers (from 1) of its wrong steps as `papo.core.credit.split_steps` splits
    it, [] for none, or a list of such lists, whose votes are combined by `vote`; None for no critique. The score that is recorded is the
    share of steps that are not wrong.

    `signals` holds `papo.core.signals.round_signals` of each generation batch in training, on every process; their means are logged as
    `papo/<name>`. The main process warns of alarms on them, each as it begins, by the limits in `limits`.

    Args:
        model, train_dataset, and everything else that GRPOTrainer takes.
        args: a PAPOConfig.
        outcome_reward, process_reward: the two rewards; the latter may be left out in variant `orm`. Or
        reward_funcs: the two in any order, with `reward_roles` in the config.
        reward_processing_classes: in the order of `reward_funcs`, else of outcome and process.

    Raises:
        ParamsError: the rewards and their roles do not fit, or the config is not a PAPOConfig.
        DataError: while training, an outcome that is not 0, 1 or None, or not one answer a response.
    """

    reward_funcs: list[Reward]
    reward_processing_classes: list[Any]
    reward_func_names: list[str]

    def __init__(
        self,
        model: Any,
        reward_funcs: Reward | list[Reward] | None = None,
        args: PAPOConfig | None = None,
        *positional: Any,
        outcome_reward: Reward | None = None,
        process_reward: Reward | None = None,
        **kwargs: Any,
    ) -> None:
        args = PAPOConfig() if args is None else args
        if not isinstance(args, PAPOConfig):
            raise ParamsError(
                f"args is a {type(args).__name__}",
                where="args",
                fix="Use papo.PAPOConfig, which takes the same settings.",
            )
        funcs, roles = _with_roles(reward_funcs, args, outcome_reward, process_reward)
        self._outcome = roles.index(OUTCOME)
        self._process = roles.index(PROCESS) if PROCESS in roles else None
        self.signals: list[dict[str, float]] = []
        self.limits = Limits()
        super().__init__(model, funcs, args, *positional, **kwargs)
        if len(self.reward_funcs) != len(roles):
            raise ParamsError(
                "an environment has a reward of its own, and no role", where="environment_factory",
                fix="Take get_reward out of it, and give its score as outcome_reward or process_reward.",
            )  # fmt: skip
        if args.variant == "capo" and not hasattr(self._tokenizer, "backend_tokenizer"):
            raise ParamsError(
                f"capo needs to know where tokens stand, which a {type(self._tokenizer).__name__} does not tell",
                where="processing_class",
                fix="Use a fast tokenizer, or another variant.",
            )
        bound = lam_max(self.num_generations)
        if args.variant == "papo" and args.guard == "none" and args.lam >= bound and self.accelerator.is_main_process:
            log.warning(
                "lam %g is not below lam_max %.3f of groups of %d: a wrong response may outrank a correct one; guard='rank' rules that out",
                args.lam, bound, self.num_generations,
            )  # fmt: skip

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> torch.Tensor:
        """(N, F) over all processes, NaN where there is no score or the process reward was not asked."""
        given = (inputs, prompts, completions, completion_ids_list)
        with self._only(self._source(self._outcome)):
            orm = super()._calculate_rewards(*given)[:, 0]
        asked = process_needed(self.args.variant, self._checked(orm), self._group_ids(len(orm)))
        rewards = torch.full((len(orm), len(self.reward_funcs)), torch.nan, device=orm.device)
        rewards[:, self._outcome] = orm
        texts = [_text(completion) for completion in completions]
        critic = None
        if self.args.variant == "capo":
            critic = _Critic(texts, completion_ids_list, self._tokenizer.backend_tokenizer, self.args.vote)
        # Over all processes, so that all of them or none take part in what TRL gathers.
        if self._process is not None and asked.any():
            reward, *rest = self._source(self._process)
            if not isinstance(reward, torch.nn.Module):
                reward = _narrow(reward, asked[self._mine(len(prompts))], rest[-1], critic)
            with self._only((reward, *rest), (_known, None, _known.__name__)):
                prm = super()._calculate_rewards(*given)[:, 0]
            rewards[:, self._process] = prm.masked_fill(~torch.as_tensor(asked, device=prm.device), torch.nan)
        self._scored = self._gathered(rewards, asked, texts, completion_ids_list, critic)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's, with the advantages of this process replaced: (B,), in `capo` (B, T) with 0 behind the end of a response."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        scored, mine, tokens = self._scored, self._mine(len(inputs)), output["completion_ids"]
        groups = self._group_ids(scored.orm.size)
        penalties = self.args.penalties(scored.lengths)
        if scored.debits is None:
            advantages = compute_advantages(
                scored.orm, scored.prm, groups, penalties=penalties, **self.args.advantage_settings
            )
            values = torch.as_tensor(advantages.total[mine], dtype=torch.float32)
        else:
            debits = [
                None if np.isnan(row).any() else row[:length]
                for row, length in zip(scored.debits, scored.lengths.astype(int), strict=True)
            ]
            by_token = token_advantages(
                scored.orm, debits, scored.lengths, groups, penalties=penalties, **self.args.capo_settings
            )
            advantages = Advantages(*by_token[:3])
            values = torch.zeros(tokens.shape)
            for row, own in zip(values, by_token.tokens[mine], strict=True):
                row[: own.size] = torch.as_tensor(own)
        output["advantages"] = values.to(tokens.device)
        self._record(scored, groups, advantages, penalties)
        return output

    def _unpenalised(self, scored: _Scored, groups: IndexArray) -> FloatArray:
        """The outcome advantages without penalties."""
        if scored.debits is None:
            return compute_advantages(scored.orm, scored.prm, groups, **self.args.advantage_settings).outcome
        without = [None] * scored.orm.size
        return token_advantages(scored.orm, without, scored.lengths, groups, **self.args.capo_settings).outcome

    def _record(
        self, scored: _Scored, groups: IndexArray, advantages: Advantages, penalties: FloatArray | None
    ) -> None:
        """Signals into TRL's metrics, and into its log of completions our advantages in place of its own."""
        mode = "train" if self.model.training else "eval"
        failed = scored.asked & np.isnan(scored.prm)
        found = round_signals(
            orm_scores=scored.orm,
            prm_scores=scored.prm,
            group_ids=groups,
            advantages=advantages,
            completion_lengths=scored.lengths,
            truncated=scored.truncated,
            prm_statuses=np.select([failed, scored.asked], ["error", "ok"], "not_asked").tolist(),
            verification=scored.verifies,
            variant=self.args.variant,
            lam=self.args.lam,
            eps=self.args.advantage_eps,
            penalties=penalties,
            unpenalised=self._unpenalised(scored, groups) if penalties is not None else None,
        )
        for name, value in found.items():
            self._metrics[mode][f"papo/{name}"].append(value)
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), groups.size)):
            logged.pop()
        logged.extend(advantages.total.tolist())
        if mode == "train":
            self.signals.append(found)
            self._watch()

    def _watch(self) -> None:
        """Warns of the alarms that begin with the last batch."""
        if not self.accelerator.is_main_process:
            return
        ringing = {alarm.name for alarm in alarms(self.signals[:-1], self.limits)}
        for alarm in alarms(self.signals, self.limits):
            if alarm.name not in ringing:
                log.warning("alarm in batch %d, %s: %s", alarm.round, alarm.name, alarm.evidence)

    def _group_ids(self, responses: int) -> IndexArray:
        """TRL's samplers lay the responses to a prompt one after another, over all processes."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        groups: IndexArray = np.arange(responses) // size
        return groups

    def _mine(self, count: int) -> slice:
        """The rows of this process among those of all."""
        return slice(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)

    def _checked(self, orm: torch.Tensor) -> FloatArray:
        name = f"outcome reward {self.reward_func_names[self._outcome]}"
        try:
            return as_outcomes(orm.cpu().double().numpy(), name)
        except DataError as error:
            fix = "Give a shaped reward as process_reward, or round it to 0 and 1."
            raise DataError(error.what, where=error.where, fix=fix) from None

    def _source(self, index: int) -> _Source:
        return self.reward_funcs[index], self.reward_processing_classes[index], self.reward_func_names[index]

    @contextmanager
    def _only(self, *sources: _Source) -> Iterator[None]:
        """Meanwhile these are all the rewards that TRL knows."""
        kept = self.reward_funcs, self.reward_processing_classes, self.reward_func_names
        self.reward_funcs, self.reward_processing_classes, self.reward_func_names = map(
            list, zip(*sources, strict=True)
        )
        try:
            yield
        finally:
            self.reward_funcs, self.reward_processing_classes, self.reward_func_names = kept

    def _gathered(
        self,
        rewards: torch.Tensor,
        asked: BoolArray,
        texts: list[str],
        completion_ids: list[list[int]],
        critic: _Critic | None,
    ) -> _Scored:
        """`rewards` and `asked` are of all processes already."""
        device = self.accelerator.device
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}  # as TRL determines what is cut off
        facts = [
            [len(ids), ids[-1] not in ends, flag]
            for ids, flag in zip(completion_ids, verification_flags(texts), strict=True)
        ]
        lengths, truncated, verifies = gather(torch.tensor(facts, dtype=torch.float32, device=device)).cpu().numpy().T
        debits = None
        if critic is not None:
            padded = self.accelerator.pad_across_processes(critic.debits.to(device), dim=1)
            debits = gather(padded).cpu().numpy()
        scores = rewards.cpu().double().numpy()
        prm = np.full(len(scores), np.nan) if self._process is None else scores[:, self._process]
        return _Scored(scores[:, self._outcome], prm, asked, lengths, truncated > 0.0, verifies > 0.0, debits)


class _Critic:
    """What the process reward says of the steps, by token: `debits` is (n, T), 0 behind the end, NaN in a row without a critique."""

    def __init__(self, texts: list[str], completion_ids: list[list[int]], tokenizer: Any, vote: str) -> None:
        self._texts, self._ids, self._tokenizer, self._vote = texts, completion_ids, tokenizer, vote
        self.debits = torch.full((len(texts), max(map(len, completion_ids))), torch.nan)

    def score(self, row: int, answer: Any, name: str) -> float | None:
        """Sets the debits of one response; the share of its steps that are not wrong."""
        if answer is None:
            return None
        steps = split_steps(self._texts[row])
        wrong = combine_votes(_marks(answer, len(steps), name), self._vote)
        starts = self._starts(row)
        numbers = token_steps(np.maximum(starts, 0), steps)
        numbers[starts < 0] = -1
        self.debits[row] = 0.0
        # A token in no step has the number -1, which is the 0 at the end.
        self.debits[row, : numbers.size] = torch.as_tensor(np.append(wrong, 0.0)[numbers])
        return float(1.0 - wrong.mean()) if steps else 1.0

    def _starts(self, row: int) -> IndexArray:
        """(T,) the character of the text at which each token starts, negative before it: a message may be the end of what was generated."""
        decoded: str = self._tokenizer.decode(self._ids[row], skip_special_tokens=True)
        before = decoded.rfind(self._texts[row])
        if before < 0:
            raise DataError(
                "the text of a response is not in what its token ids decode to",
                where=f"completion {self._texts[row][:60]!r}",
                fix="capo needs them to be the same: switch off clean_up_tokenization_spaces, or choose another variant.",
            )
        starts: IndexArray = np.array(token_starts(self._tokenizer, self._ids[row], decoded), dtype=np.intp)
        return starts - before


def _marks(answer: Any, steps: int, name: str) -> FloatArray:
    """(k, steps), 1 where a critique calls the step wrong, from a list of the numbers of wrong steps or a list of k such lists."""
    several = isinstance(answer, list) and any(isinstance(one, list) for one in answer)
    critiques = answer if several else [answer]
    marks = np.zeros((len(critiques), steps))
    for row, critique in zip(marks, critiques, strict=True):
        if not isinstance(critique, list) or any(type(n) is not int or not 1 <= n <= steps for n in critique):
            raise DataError(
                f"process reward {name} gave {answer!r} for a response of {steps} steps",
                where=f"process reward {name}",
                fix="For capo, give a list of the numbers of the wrong steps, from 1 as papo.core.credit.split_steps splits the "
                "response, a list of such lists, or None.",
            )
        row[[n - 1 for n in critique]] = 1.0
    return marks


def _with_roles(
    reward_funcs: Reward | list[Reward] | None, args: PAPOConfig, outcome: Reward | None, process: Reward | None
) -> tuple[list[Reward], list[str]]:
    """The rewards and the role of each."""
    if outcome is not None or process is not None:
        if reward_funcs is not None or args.reward_roles is not None:
            raise ParamsError(
                "rewards are given in two ways at once", where="reward_funcs",
                fix="Give outcome_reward and process_reward, or reward_funcs with reward_roles.",
            )  # fmt: skip
        given = {role: reward for role, reward in ((OUTCOME, outcome), (PROCESS, process)) if reward is not None}
        funcs, roles = list(given.values()), list(given)
    else:
        funcs = [] if reward_funcs is None else list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
        roles = list(args.reward_roles or [])
        if len(roles) != len(funcs):
            raise ParamsError(
                f"there are {len(funcs)} reward functions and {len(roles)} roles", where="reward_roles",
                fix="Give outcome_reward and process_reward, or one role (outcome, process) for each of reward_funcs.",
            )  # fmt: skip
    if unknown := sorted(set(roles) - {OUTCOME, PROCESS}):
        raise ParamsError(f"unknown role {unknown[0]!r}", where="reward_roles", fix=f"Choose {OUTCOME} or {PROCESS}.")
    least = 0 if args.variant == "orm" else 1
    if roles.count(OUTCOME) != 1 or not least <= roles.count(PROCESS) <= 1:
        raise ParamsError(
            f"variant {args.variant} needs one outcome and one process reward, not "
            f"{roles.count(OUTCOME)} and {roles.count(PROCESS)}",
            where="outcome_reward, process_reward or reward_roles",
            fix="Combine several of a kind into one function; variant orm needs no process reward.",
        )
    if args.variant == "capo" and isinstance(funcs[roles.index(PROCESS)], str | torch.nn.Module):
        raise ParamsError(
            "a reward model names no wrong steps", where="process_reward",
            fix="For capo, give a function that names them, or choose another variant.",
        )  # fmt: skip
    return funcs, roles


def _narrow(reward: Callable[..., Any], asked: BoolArray, name: str, critic: _Critic | None) -> Callable[..., Any]:
    """`reward`, called with the rows asked about alone; its answers are put back in their places, None in the others."""
    rows = np.flatnonzero(asked).tolist()

    def scattered(values: Sequence[Any]) -> list[Any]:
        if len(values) != len(rows):
            raise DataError(
                f"process reward {name} gave {len(values)} values for the {len(rows)} responses it was asked about",
                where=f"process reward {name}",
                fix="Give one a response, None where there is none.",
            )
        placed: list[Any] = [None] * asked.size
        for row, value in zip(rows, values, strict=True):
            placed[row] = value
        return placed

    def scores(values: Sequence[Any]) -> list[Any]:
        placed = scattered(values)
        return placed if critic is None else [critic.score(row, value, name) for row, value in enumerate(placed)]

    def chosen(given: dict[str, Any]) -> dict[str, Any]:
        narrowed = {
            key: [value[row] for row in rows] if isinstance(value, list) else value for key, value in given.items()
        }
        write = given["log_extra"]
        return narrowed | {"log_extra": lambda column, values: write(column, scattered(values))}

    async def ask_async(**given: Any) -> list[Any]:
        return scores(await reward(**chosen(given)) if rows else [])

    def ask(**given: Any) -> list[Any]:
        return scores(reward(**chosen(given)) if rows else [])

    return ask_async if is_async_callable(reward) else ask


def _known(prompts: list[Any], **given: Any) -> list[float]:
    """In place of the outcome, which is known: keeps TRL from warning of rows without any score, which nobody was asked about."""
    return [0.0] * len(prompts)


def _text(completion: Any) -> str:
    """The text of a completion, also of a conversational one."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")
