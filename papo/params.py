"""The params of every stage: one frozen model a stage, unknown keys refused, every bound stated on its field.

`params.yaml` is the embedded default. A preset (a YAML file with some of the same keys) and `--set key=value` are laid over it, in
that order; what results is validated as a whole. Importing this module needs neither torch nor any service.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from papo.errors import ParamsError
from papo.secrets import secret_in, secrets_of, without_secrets

Variant = Literal["orm", "prm", "mult", "fullnorm", "papo", "gdpo", "convex", "capo"]
Format = Literal[
    "auto", "columns", "papo", "verl", "numina", "gsm8k", "math", "olympiadbench", "aime", "gpqa", "humaneval"
]  # fmt: skip
Metric = Literal["avg_at_k", "pass_at_k", "maj_at_k"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]

GENERATED = ("sums", "programs")
"""Sources that are made by the seed alone, with benchmarks and traces of their own."""

UNDECIDING = ("flow", "on_alarm", "tracking")
"""Sections that no result depends on: they are in no lineage, no manifest and no stage of dvc.yaml."""

PRESETS = Path("infra/presets")
BENCHMARKS = Path(__file__).parent / "benchmarks"


class PathMark:
    """Marks a param that may name a file or folder; `papo.paths` says where it may lie."""


ProjectPath = Annotated[str, Field(min_length=1), PathMark()]
"""A file or folder, or a name (of the hub, of a rubric, of a generated source) that is none; or the URI of a file."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")]
"""What a file is named after: no separators, and it does not begin with a dot."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _plain_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return whole and not ("@" in parts.netloc or "?" in url or "#" in url or any(char.isspace() for char in url))


def _check_address(api_key_env: str, *urls: str) -> None:
    """Refuses what is no name of an environment variable, or no plain URL."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", api_key_env):
        raise ValueError("api_key_env takes the name of an environment variable, such as OPENAI_API_KEY; never the key")
    if not all(map(_plain_url, urls)):
        raise ValueError("a base URL is http(s)://host[:port][/path], without user, password or query")


class RayParams(_Section):
    """The Ray cluster that scores; it decides no result."""

    address: str = Field(
        "auto",
        pattern=r"^(auto|local|(ray://)?[A-Za-z0-9_.-]+:[0-9]+|(ray://)?\[[0-9A-Fa-f:]+\]:[0-9]+)$",
        description="host:port of its head, from a machine of the cluster; ray://host:port from any other; auto: the one that "
        "this machine belongs to, or RAY_ADDRESS; local: one on this machine, for the run alone.",
    )
    chunk: int = Field(2048, ge=1, le=1_000_000, description="Responses that are scored as one task.")


class RunParams(_Section):
    """What the rounds share."""

    seed: int = Field(0, ge=0, lt=2**31, description="Seed of sampling, training order and evaluation.")
    rounds: int = Field(16, ge=1, le=10_000, description="Rounds of rollout, scoring, advantage and training.")
    overlap: bool = Field(True, description="Score the shards that are stored while others are sampled.")
    ray: RayParams | None = Field(None, description="Score on a Ray cluster, in the flows; null: in the run's process.")

    @property
    def deciding(self) -> dict[str, Any]:
        """Those that decide results; the others say where, and when."""
        return self.model_dump(mode="json", exclude={"overlap", "ray"})


Stage = Literal[
    "prepare", "warmstart", "rollout", "score_orm", "score_prm", "advantage", "train", "evaluate", "report"
]  # fmt: skip


class FlowParams(_Section):
    """How the flow looks after the stages; no result depends on it, nor does a run without Prefect."""

    timeouts: dict[Stage, Annotated[float, Field(gt=0.0, le=100_000.0)]] = Field(
        default_factory=dict,
        description="Minutes after which one run of a stage is ended and started again, such as {rollout: 90}; none: no limit.",
    )


class Tier(_Section):
    """Problems of one difficulty: sums and differences with this many one-digit terms."""

    min_terms: int = Field(ge=2, le=30)
    max_terms: int = Field(ge=2, le=30)
    problems: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Tier:
        if self.min_terms > self.max_terms:
            raise ValueError(f"min_terms {self.min_terms} is above max_terms {self.max_terms}")
        return self


class SumsParams(_Section):
    """The generated problems and the traces that the embedded policy is warm-started on."""

    train: Tier = Tier(min_terms=3, max_terms=7, problems=2048)
    eval: dict[Name, Tier] = Field(
        default_factory=lambda: {
            "sums-in-range": Tier(min_terms=3, max_terms=7, problems=200),
            "sums-hard": Tier(min_terms=8, max_terms=8, problems=100),
        }
    )
    traces: Positive = 20_000
    wrong_step_share: Share = Field(0.03, description="Share of trace steps with a wrong result.")
    merged_share: Share = Field(0.20, description="Share of traces that do two operations in one step.")
    bare_share: Share = Field(0.30, description="Share of traces that state only the answer.")
    bare_wrong_share: Share = Field(0.10, description="Share of bare answers that are wrong.")
    verbose_share: Share = Field(0.15, description="Share of traces padded with true but irrelevant identities.")

    @model_validator(mode="after")
    def _shares(self) -> SumsParams:
        total = self.merged_share + self.bare_share + self.verbose_share
        if total > 1.0:
            raise ValueError(f"merged_share + bare_share + verbose_share is {total:g}, above 1")
        return self


class ProgramTier(_Section):
    """Problems of one difficulty: programs that do this many operations in turn."""

    min_operations: int = Field(ge=2, le=8)
    max_operations: int = Field(ge=2, le=8)
    problems: Positive

    @model_validator(mode="after")
    def _ordered(self) -> ProgramTier:
        if self.min_operations > self.max_operations:
            raise ValueError(f"min_operations {self.min_operations} is above max_operations {self.max_operations}")
        return self


class ProgramsParams(_Section):
    """The generated programming problems and the programs that the embedded policy is warm-started on."""

    train: ProgramTier = ProgramTier(min_operations=2, max_operations=4, problems=1024)
    eval: dict[Name, ProgramTier] = Field(
        default_factory=lambda: {
            "programs-in-range": ProgramTier(min_operations=2, max_operations=4, problems=100),
            "programs-hard": ProgramTier(min_operations=5, max_operations=5, problems=50),
        }
    )
    traces: Positive = 20_000
    cramped_share: Share = Field(0.30, description="Share of traces that do all in one line, in one-letter names.")
    terse_share: Share = Field(0.15, description="Share of traces that are one nested expression of one-letter names.")
    padded_share: Share = Field(0.20, description="Share of traces that begin with lines that do nothing.")
    wrong_share: Share = Field(0.30, description="Share of traces, whatever their style, that fail.")

    @model_validator(mode="after")
    def _shares(self) -> ProgramsParams:
        total = self.cramped_share + self.terse_share + self.padded_share
        if total > 1.0:
            raise ValueError(f"cramped_share + terse_share + padded_share is {total:g}, above 1")
        return self


class ColumnsParams(_Section):
    """Which column of a loaded data set holds what; dots reach into nested fields (`reward_model.ground_truth`).

    `prompt`, `answer` and `reference_solution` are for the format `columns`; `tier` and `pass_rate` are read with any.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    reference_solution: str | None = None
    tier: str | None = None
    pass_rate: str | None = None


def _template(value: str) -> str:
    """A prompt template in which {prompt} stands, and no other name."""
    if "{prompt}" not in value:
        raise ValueError("must contain {prompt}")
    try:
        value.format(prompt="")
    except (IndexError, KeyError, ValueError):
        raise ValueError("only {prompt} may stand in single braces; double all others: \\boxed{{}}") from None
    return value


Template = Annotated[str, AfterValidator(_template)]


class EvalSource(_Section):
    """One benchmark: a local file or a hub id, how it is read, asked, graded and summed up.

    Those of papo/benchmarks/ are taken by their name: `math-500: null` is the file papo/benchmarks/math-500.yaml as it stands,
    `math-500: path` the same with another source, and a mapping is laid over it key by key; `benchmark: math-500` names the file where
    the key of the entry is another. A plain string is the source alone.
    """

    source: ProjectPath
    format: Format = "auto"
    split: str | None = Field(None, description="Of the hub; null: prepare.eval_split.")
    subset: str | None = Field(None, description="Of the hub, such as gpqa_diamond.")
    revision: str | None = None
    prompt: Template | None = Field(None, description="What is said around {prompt}; null: prepare.prompt_template.")
    extraction: Literal["boxed", "answer_is"] | None = Field(None, description="null: as the format has it.")
    metric: Metric = Field("avg_at_k", description="What the paired difference and the report's first line are about.")
    problems: int | None = Field(None, ge=1, description="In a whole copy; another number is warned about.")
    max_problems: int | None = Field(None, ge=1, description="So many of them, drawn by prepare.seed; null: all.")


@lru_cache
def defined_benchmarks() -> dict[str, dict[str, Any]]:
    """The files of papo/benchmarks/ by name, each the keys of an EvalSource."""
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(BENCHMARKS.glob("*.yaml"))}


def _benchmark(name: str, entry: Any) -> Any:
    """The entry laid over the file of its name; its source alone if it is a string."""
    given = {} if entry is None else {"source": entry} if isinstance(entry, str) else entry
    if not isinstance(given, Mapping):
        return given
    known = defined_benchmarks()
    wanted = given.get("benchmark", name)
    if wanted not in known and ("benchmark" in given or entry is None):
        raise ValueError(f"{wanted} is no file of papo/benchmarks ({', '.join(known)}): name one, or a source")
    definition = known.get(wanted, {})
    if "source" in given:  # where in the hub's data set it lies says nothing of another source
        definition = {key: value for key, value in definition.items() if key not in ("split", "subset", "revision")}
    return definition | {key: value for key, value in given.items() if key != "benchmark"}


class TiersParams(_Section):
    """As many training problems of each of the five tiers of the pass rate."""

    per_tier: Positive
    pass_rate: str | None = Field(None, description="Column of the pass rate; null: columns.pass_rate.")


class PrepareParams(_Section):
    """Problem sets: generated, or loaded in one of the formats; what training problems have to fulfil."""

    source: ProjectPath = Field(
        "sums", description="`sums`, `programs`, a local file (.jsonl, .parquet, ...), or a hub id."
    )
    format: Format = Field("auto", description="auto: by the columns there are; `columns` where the mapping is set.")
    split: str = "train"
    subset: str | None = Field(None, description="Of the hub, such as main for openai/gsm8k.")
    revision: str | None = None
    seed: int = Field(0, ge=0, lt=2**31)
    sums: SumsParams = SumsParams()
    programs: ProgramsParams = ProgramsParams()
    columns: ColumnsParams = ColumnsParams()
    eval_sources: dict[Name, EvalSource] = Field(default_factory=dict, description="Benchmark name -> file or hub id.")
    eval_split: str = "test"
    holdout: int = Field(0, ge=0, description="Training problems held out as benchmark `holdout`.")
    max_problems: int | None = Field(None, ge=1)
    max_prompt_chars: Positive = Field(8_000, description="A longer training prompt is dropped.")
    drop_never_solved: bool = Field(True, description="Drop training problems of pass rate 0.")
    near_match: float | None = Field(
        0.7, gt=0.0, le=1.0, description="Likeness to a benchmark's problem that drops one; null: only equal ones."
    )
    tiers: TiersParams | None = None
    prompt_template: Template = "{prompt}"

    @field_validator("eval_sources", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {name: _benchmark(name, item) for name, item in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _consistent(self) -> PrepareParams:
        if self.tiers is not None and self.pass_rate_column is None:
            raise ValueError("tiers need a column of pass rates: set tiers.pass_rate or columns.pass_rate")
        if taken := {"train", *self.generated, *(["holdout"] if self.holdout else [])} & self.eval_sources.keys():
            raise ValueError(f"eval_sources: {', '.join(sorted(taken))} is the name of another set")
        return self

    @property
    def generated(self) -> list[str]:
        """Benchmarks that a generated source makes."""
        made = {"sums": list(self.sums.eval), "programs": list(self.programs.eval)}
        return made.get(self.source, [])

    @property
    def pass_rate_column(self) -> str | None:
        """Column of the training set's pass rates."""
        return (self.tiers.pass_rate if self.tiers else None) or self.columns.pass_rate


class ModelParams(_Section):
    """Shape of the embedded policy (a Llama decoder)."""

    hidden_size: int = Field(96, ge=8, multiple_of=8)
    intermediate_size: int = Field(256, ge=8)
    layers: int = Field(3, ge=1, le=64)
    heads: int = Field(3, ge=1)


class WarmstartParams(_Section):
    """The policy that round 0 samples from: trained on traces, or an existing checkpoint."""

    checkpoint: ProjectPath | None = None
    revision: str | None = None
    trust_code: tuple[str, ...] = Field(
        (),
        description="Checkpoints whose own Python code may run: name@revision, or the folder, each exactly as it is named here.",
    )
    seed: int = Field(0, ge=0, lt=2**31)
    model: ModelParams = ModelParams()
    steps: Positive = 1000
    batch_size: Positive = 64
    microbatch: Positive = 16
    learning_rate: float = Field(1.5e-3, gt=0)
    warmup_share: Share = 0.05


class ServerParams(_Section):
    """The vLLM servers that a policy is sampled from: started by papo, or already there."""

    base_urls: list[str] = Field(
        default_factory=list,
        description="Of servers that are there, such as http://localhost:8000/v1; empty: papo starts its own.",
    )
    model: str | None = Field(
        None, min_length=1, description="Name that the servers give the policy; null: their only one."
    )
    reload: str | None = Field(
        None, min_length=1, description="Shell command that has the servers of base_urls load the folder {policy}."
    )
    command: str = Field(
        "vllm serve",
        min_length=1,
        description="What starts a server; the folder of the policy and flags are added to it.",
    )
    options: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="Further flags of a server that papo starts: max-model-len: 4096."
    )
    servers: int = Field(1, ge=1, le=64, description="How many papo starts.")
    devices: list[str] = Field(
        default_factory=list, description="CUDA_VISIBLE_DEVICES of each server that papo starts; empty: all see all."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="What the servers compute in; decides how near their log-probs have to be to the policy's.",
    )
    max_difference: float | None = Field(
        None, gt=0.0, description="Of a log-prob of the server and of the policy; null: by dtype."
    )
    concurrency: int = Field(256, ge=1, le=4096, description="Rows at a time, of each server.")
    timeout_s: float = Field(600.0, gt=0.0, le=86_400.0, description="For one row.")
    tries: int = Field(3, ge=1, le=100, description="After which a server is left out.")
    start_s: float = Field(900.0, gt=0.0, le=86_400.0, description="For a server to start, or to load a policy.")
    api_key_env: str = Field("VLLM_API_KEY", description="Environment variable with the key; need not be set.")

    # Of the model as a whole, as errors of a field show its value, which may be a key in the wrong place.
    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_address(self.api_key_env, *self.base_urls)
        if len(set(self.base_urls)) < len(self.base_urls):
            raise ValueError("base_urls names a server twice")
        if self.reload is not None and not self.base_urls:
            raise ValueError("reload is for servers that are already there: set base_urls, too")
        if self.devices and len(self.devices) != self.servers:
            raise ValueError(f"devices has {len(self.devices)} entries for {self.servers} servers")
        if taken := {name.replace("_", "-") for name in self.options} & {"host", "port", "api-key"}:
            raise ValueError(
                f"options: {', '.join(sorted(taken))}: papo's own servers are for this machine alone; "
                "`papo serve-policy` takes --host and --port, and the key is in the environment variable api_key_env"
            )
        return self


class VllmParams(_Section):
    """vLLM in processes of papo's own, which end before the policy is trained."""

    python: str | None = Field(
        None, min_length=1, description="Interpreter of the environment that has vLLM; null: the one papo runs in."
    )
    options: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="Further arguments of vllm.LLM: tensor_parallel_size: 2."
    )
    devices: list[str] = Field(
        default_factory=list,
        description="CUDA_VISIBLE_DEVICES of each engine, one engine an entry; empty: one, which sees all.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    start_s: float = Field(900.0, gt=0.0, le=86_400.0, description="For an engine to load the policy.")
    stall_s: float = Field(
        600.0, gt=0.0, le=86_400.0, description="Without a finished row, after which an engine is taken for dead."
    )


class RolloutParams(_Section):
    """G samples a prompt from the policy of the round."""

    engine: Literal["transformers", "vllm", "vllm-server"] = "transformers"
    prompts_per_round: Positive = 48
    group_size: int = Field(8, ge=2, le=1024, description="G; a group of 1 has no advantage.")
    temperature: float = Field(1.0, ge=0.0, le=10.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    max_prompt_tokens: int = Field(2048, ge=1, description="A longer prompt is left out, and counted.")
    max_new_tokens: Positive = 96
    prompts_per_shard: Positive = Field(
        48, description="Prompts that are stored as one shard; with transformers, sampled as one batch of batches."
    )
    batch_rows: int | None = Field(
        None, ge=1, description="transformers: responses at a time; null: a power of two that memory has room for."
    )
    max_prompts: int | None = Field(
        None,
        ge=1,
        description="Further prompts are sampled until prompts_per_round groups have an advantage that is not zero, this many at most; "
        "null: a round is its first prompts_per_round, whatever their advantage.",
    )
    checked_rows: int = Field(
        16, ge=0, description="Responses of a round whose log-probs are computed anew by the trainer's model."
    )
    server: ServerParams = ServerParams()
    vllm: VllmParams = VllmParams()

    @model_validator(mode="after")
    def _sampled(self) -> RolloutParams:
        if self.temperature == 0.0:
            raise ValueError(
                f"temperature 0 with group_size {self.group_size} gives {self.group_size} equal samples a prompt "
                "and no advantage; use a temperature above 0"
            )
        if self.top_p < 1.0:
            raise ValueError(
                "top_p below 1 samples from a truncated distribution, whose log-probs training would not match; use 1.0"
            )
        if self.max_prompts is not None and self.max_prompts < self.prompts_per_round:
            raise ValueError(f"max_prompts {self.max_prompts} is below prompts_per_round {self.prompts_per_round}")
        return self

    @property
    def dtype(self) -> str:
        """What the engine computes in."""
        return {"vllm": self.vllm.dtype, "vllm-server": self.server.dtype}.get(self.engine, "float32")

    @property
    def sampler(self) -> str:
        """Engine and type: what names a way of sampling, where servers and processes do not matter."""
        return self.engine if self.engine == "transformers" else f"{self.engine} {self.dtype}"

    @property
    def commands(self) -> dict[str, str]:
        """What starts engines and servers, as text."""
        server, vllm = self.server, self.vllm
        given = {"server.command": server.command, "server.options": server.options, "vllm.options": vllm.options}
        return {name: json.dumps(value) for name, value in given.items()}

    @property
    def deciding(self) -> dict[str, Any]:
        """Those that decide what is sampled; the others say where, and how fast."""
        unused = {"server", "vllm"} | ({"batch_rows"} if self.engine != "transformers" else set())
        return self.model_dump(mode="json", exclude=unused) | {"dtype": self.dtype}


class SandboxParams(_Section):
    """Limits of one run of a program, and what makes the sandbox: bubblewrap, or a container."""

    wall_s: float = Field(10.0, gt=0.0, le=3600.0)
    cpu_s: int = Field(10, ge=1, le=3600, description="Of each process.")
    memory_mb: int = Field(1024, ge=64, description="Address space of each process, and resident memory of all.")
    processes: int = Field(32, ge=2, le=4096, description="Processes and threads together.")
    file_mb: int = Field(16, ge=1, description="Of one file, and of all together.")
    runtime: Literal["podman", "docker"] | None = Field(None, description="Instead of bubblewrap; needs an image.")
    image: str | None = Field(None, min_length=1, description="An image with `python3`, which is not pulled.")

    @model_validator(mode="after")
    def _whole(self) -> SandboxParams:
        if (self.runtime is None) != (self.image is None):
            raise ValueError("runtime and image belong together: name both, or neither for bubblewrap")
        return self


class ChatParams(_Section):
    """A model behind an OpenAI-compatible server, and how it is asked."""

    model: str = Field(min_length=1)
    base_url: str | None = Field(
        None, description="Of an OpenAI-compatible server, such as http://localhost:8000/v1; null: that of OpenAI."
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="Environment variable with the key; need not be set where base_url is."
    )
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    max_tokens: int = Field(2048, ge=1, description="Of a reply, the thinking of the model included.")
    concurrency: int = Field(16, ge=1, le=1024, description="Calls at a time.")
    requests_per_minute: int | None = Field(None, ge=1, description="Evenly spread, tries included; null: no limit.")
    tokens_per_minute: int | None = Field(None, ge=1, description="Of prompts and replies; null: no limit.")
    timeout_s: float = Field(120.0, gt=0.0, le=3600.0, description="Deadline of one call with all its tries.")
    tries: int = Field(5, ge=1, le=100, description="Of one call.")
    breaker: int = Field(10, ge=1, description="Calls failed in a row for want of a server, after which none is made.")

    # Of the model as a whole, as errors of a field show its value, which may be a key in the wrong place.
    @model_validator(mode="after")
    def _without_secrets(self) -> Self:
        _check_address(self.api_key_env, *([self.base_url] if self.base_url is not None else []))
        return self


class SecondOpinionParams(ChatParams):
    """A model that is asked about answers which the verifier calls wrong; what it says is recorded and changes no outcome."""

    max_tokens: int = Field(1024, ge=1, description="Of a reply: one word, and room for a model that thinks before it.")
    concurrency: int = Field(8, ge=1, le=256, description="Questions at a time.")
    timeout_s: float = Field(60.0, gt=0.0, le=3600.0, description="For one question with all its tries.")
    tries: int = Field(3, ge=1, le=100, description="Of one question.")


class ScoreOrmParams(_Section):
    """Outcome: is the last boxed answer equal to the gold answer, does the program pass its tests?"""

    verifier: Literal["math-verify"] = "math-verify"
    timeout_s: float = Field(2.0, gt=0.0, le=600.0, description="Limit for one pair of answers.")
    workers: int = Field(
        1, ge=1, le=256, description="Child processes for what strings do not settle; programs at a time."
    )
    sandbox: SandboxParams = SandboxParams()
    second_opinion: SecondOpinionParams | None = None
    max_failed_share: Share = 0.05


class Price(_Section):
    """Of a million tokens, in any currency."""

    prompt: float = Field(ge=0.0)
    completion: float = Field(ge=0.0)


class NoiseParams(_Section):
    """Errors that a judge of the test bench is given, to learn how many of them training bears."""

    flipped: Share = Field(0.0, description="Share of verdicts that are turned around.")
    missing: Share = Field(0.0, description="Share of verdicts that are lost, as of calls that fail.")


class ScorePrmParams(_Section):
    """Process: how good is the reasoning? From `model` to `budget` the keys are for judge `model`."""

    judge: Literal["steps", "steps-gullible", "readability", "model"] = "steps"
    model: ChatParams | None = None
    rubric: ProjectPath = Field("levels", description="One of papo/rubrics/ by name, or a file.")
    votes: int = Field(1, ge=1, le=64, description="How often the model is asked about a response.")
    vote: Literal["median", "majority", "mean"] = Field("median", description="How several votes are combined.")
    store: ProjectPath | None = Field(None, description="File of the store of verdicts; null: .papo/verdicts.sqlite.")
    prices: dict[str, Price] = Field(default_factory=dict, description="By model.")
    budget: float | None = Field(None, gt=0.0, description="What a run may spend on its judge; null: no limit.")
    max_failed_share: Share = 0.2
    noise: NoiseParams | None = Field(None, description="Errors added to a judge that is no model; null: none.")
    max_length_bias: Share = Field(
        0.3,
        description="Correlation of score and length among equally good responses, as `papo calibrate-judge` measures it, above which a "
        "run warns of its judge.",
    )

    @model_validator(mode="after")
    def _askable(self) -> ScorePrmParams:
        if self.judge != "model":
            return self
        if self.noise is not None:
            raise ValueError("noise is for the judges of the test bench, which cost nothing: set noise to null")
        if self.model is None:
            raise ValueError("judge model needs to know which: set model, such as {model: gpt-oss-20b, base_url: ...}")
        if self.votes > 1 and self.model.temperature == 0.0:
            raise ValueError(f"votes {self.votes} at temperature 0 would repeat one vote; set model.temperature")
        if self.budget is not None and self.model.model not in self.prices:
            raise ValueError(f"budget needs to know what a call costs: set prices.{self.model.model}")
        return self

    @property
    def price(self) -> Price | None:
        """Of the model."""
        return self.prices.get(self.model.model) if self.model is not None else None

    @property
    def deciding(self) -> dict[str, Any]:
        """Those that decide what a response is worth; the others say how it is found out, how fast, and what it may cost."""
        if self.judge != "model":
            return self.model_dump(mode="json", include={"judge", "max_failed_share", "noise"})
        asked = {"model", "temperature", "max_tokens"}
        kept = {"judge", "rubric", "votes", "vote", "max_failed_share"}
        return self.model_dump(mode="json", include={**dict.fromkeys(kept, True), "model": asked})


class OverlongParams(_Section):
    """A penalty on the outcome of responses near the limit rollout.max_new_tokens; which are correct stays by the outcome alone."""

    buffer: int = Field(ge=1, description="Tokens before the limit over which the penalty rises from 0 to factor.")
    factor: float = Field(
        0.5,
        gt=0.0,
        le=100.0,
        description="Penalty at the limit. The outcome is 0 or 1: 0.5 is DAPO's 1 for rewards of -1 and 1.",
    )


class AdvantageParams(_Section):
    """Decoupled advantages: arXiv 2603.26535, Eq. 3 to 5, and its variants."""

    variant: Variant = "papo"
    lam: float = Field(1.0, ge=0.0, le=100.0, description="Weight of the process advantage.")
    scale: Literal["std", "mean_only"] = "std"
    eps: float = Field(1e-6, gt=0.0, le=1.0)
    guard: Literal["none", "rank"] = "none"
    w_whole: float = Field(2.0, gt=0.0, le=100.0, description="capo only: weight of the outcome in a token's reward.")
    w_proc: float = Field(1.0, ge=0.0, le=100.0, description="capo only: weight of a token's debit, at most w_whole.")
    overlong: OverlongParams | None = Field(
        None, description="Penalty for length; in prm and mult on their one reward. null: none."
    )
    missing: Literal["missing", "zero"] = Field(
        "missing",
        description="What a process score counts as that could not be had; zero only to measure what that costs.",
    )
    length_neutral: bool = Field(
        False, description="Take out of the process scores what follows length among correct responses."
    )
    length_cost: float = Field(
        0.0,
        ge=0.0,
        le=100.0,
        description="What a correct response of rollout.max_new_tokens pays of its process score; a shorter one in proportion.",
    )

    @model_validator(mode="after")
    def _process_reward(self) -> AdvantageParams:
        changed = self.missing != "missing" or self.length_neutral or self.length_cost > 0.0
        if changed and self.variant in ("orm", "capo"):
            raise ValueError(
                f"missing, length_neutral and length_cost are about process scores, which {self.variant} has none of"
            )
        return self

    @model_validator(mode="after")
    def _capo(self) -> AdvantageParams:
        if self.w_proc > self.w_whole:
            raise ValueError(
                f"w_proc {self.w_proc:g} is above w_whole {self.w_whole:g}: a correct response with wrong steps would fall "
                "below a wrong one"
            )
        if self.guard == "rank" and self.variant == "capo":
            raise ValueError("guard rank has no process advantage to bound in variant capo, whose debits are by token")
        return self

    @model_validator(mode="after")
    def _convex(self) -> AdvantageParams:
        if self.variant == "convex" and self.lam > 1.0:
            raise ValueError(f"variant convex needs lam between 0 and 1, got {self.lam:g}")
        if self.guard == "rank" and self.variant in ("prm", "mult"):
            raise ValueError(f"guard rank has no outcome advantage to rank by in variant {self.variant}")
        return self

    @model_validator(mode="after")
    def _guarded(self) -> AdvantageParams:
        if self.guard == "rank" and self.overlong is not None and self.overlong.factor > 0.9:
            raise ValueError(
                f"guard rank needs overlong.factor 0.9 or less, got {self.overlong.factor:g}: a correct response at the limit has to be "
                "worth more than a wrong one"
            )
        return self


class ScheduleParams(_Section):
    """How the learning rate goes from round to round: by the share of `rounds` that is done, so that a restart changes nothing."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_rounds: float = Field(0.0, ge=0.0, description="Rounds, or a part of one, over which it rises from 0.")
    rounds: int | None = Field(None, ge=1, description="linear, cosine: after which it is at its floor.")
    floor: Share = Field(0.0, description="linear, cosine: share of learning_rate at the end.")

    @model_validator(mode="after")
    def _ends(self) -> ScheduleParams:
        if self.kind != "constant" and (self.rounds is None or self.warmup_rounds >= self.rounds):
            raise ValueError(f"kind {self.kind} needs rounds, and more of them than warmup_rounds")
        return self


class KlParams(_Section):
    """Penalty on the distance from the warm start: coefficient x KL, fixed or adapted to a target."""

    coefficient: float = Field(0.0, ge=0.0)
    target: float | None = Field(None, gt=0.0, description="KL a token, in nats, to which the coefficient is adapted.")
    horizon: int = Field(
        10_000, ge=1, description="target: responses over which the coefficient may change by a fifth."
    )

    @model_validator(mode="after")
    def _starts(self) -> KlParams:
        if self.target is not None and self.coefficient == 0.0:
            raise ValueError("target needs a coefficient to start from, such as 0.01")
        return self


class LoraParams(_Section):
    """Low-rank adapters in place of all weights; the policy that is written has them merged."""

    rank: int = Field(16, ge=1, le=4096)
    alpha: float = Field(32.0, gt=0.0, description="The adapters' product counts alpha / rank.")
    targets: list[str] | Literal["all-linear"] = Field("all-linear", description="Modules by the end of their names.")


class DevicesParams(_Section):
    """Over how many processes, a device each, training is spread, by accelerate."""

    processes: int = Field(1, ge=1, le=1024)
    kind: Literal["ddp", "fsdp", "deepspeed"] = Field(
        "ddp", description="ddp: whole weights on each; fsdp: sharded; deepspeed: ZeRO."
    )
    zero_stage: Literal[1, 2, 3] = Field(2, description="deepspeed only.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU where there is one.")


class TrainParams(_Section):
    """One pass over the advantages of a round. docs/training.md has the equations."""

    learning_rate: float = Field(1e-4, gt=0.0, le=1.0)
    schedule: ScheduleParams = ScheduleParams()
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    clip_low: float = Field(0.2, gt=0.0, lt=1.0)
    clip_high: float = Field(0.28, gt=0.0)
    dual_clip: float | None = Field(
        None, gt=1.0, description="Where the advantage is negative, the most that a ratio counts."
    )
    loss: Literal["token_mean", "sequence_mean", "dr_grpo"] = "token_mean"
    importance: Literal["none", "token", "sequence"] = Field(
        "none",
        description="Weight by pi_trainer / pi_sampler before the first step; clipping is against the trainer's then.",
    )
    importance_cap: float = Field(2.0, gt=0.0, description="The most that such a weight may be.")
    kl: KlParams = KlParams()
    entropy_bonus: float = Field(0.0, ge=0.0)
    mask_truncated: bool = Field(False, description="Leave out responses that the limit on new tokens cut off.")
    minibatch_prompts: int = Field(16, ge=1, description="Prompts in one optimizer step.")
    microbatch_tokens: int = Field(2048, ge=1, description="Tokens, padding included, in one forward pass.")
    skip_zero: bool = Field(True, description="No forward pass for responses that give no gradient.")
    share_prompts: bool = Field(True, description="The prompt of several responses is computed once.")
    packing: Literal["auto", "on", "off"] = Field(
        "auto", description="One sequence without padding; auto: where the attention takes it without a dense mask."
    )
    attention: str | None = Field(None, description="As transformers' attn_implementation; null: as it chooses.")
    logits_mb: int | None = Field(64, ge=1, description="MiB of logits that exist at a time; null: no limit.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the forward pass; weights are float32.")
    gradient_checkpointing: bool = False
    lora: LoraParams | None = None
    devices: DevicesParams = DevicesParams()
    save_minutes: float = Field(10.0, ge=0.0, description="How often a round under way is saved; 0: after each step.")
    max_broken_steps: int = Field(3, ge=1, description="Steps without a finite gradient, after which the stage stops.")

    @property
    def needs_reference(self) -> bool:
        """Whether the warm start takes part, beside the policy that sampled."""
        return self.kl.coefficient > 0.0 or self.lora is not None

    @model_validator(mode="after")
    def _fits(self) -> TrainParams:
        if self.lora is not None and (self.devices.processes > 1 and self.devices.kind != "ddp"):
            raise ValueError(
                f"lora goes with devices.kind ddp, not {self.devices.kind}: adapters are small enough for each process"
            )
        if self.optimizer == "adamw_8bit" and (self.devices.processes > 1 and self.devices.kind != "ddp"):
            raise ValueError(
                f"optimizer adamw_8bit goes with devices.kind ddp, not {self.devices.kind}, which shards the moments"
            )
        return self


class EvaluateParams(_Section):
    """avg@k and pass@k of the warm start and the final policy."""

    benchmarks: tuple[str, ...] = Field(("sums-in-range", "sums-hard"), min_length=1)
    samples_per_problem: int = Field(4, ge=1, le=1024)
    temperature: float = Field(0.7, ge=0.0, le=10.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    max_new_tokens: Positive = 128
    problems_per_shard: Positive = Field(200, description="Problems sampled as one batch and stored as one shard.")
    confidence: float = Field(0.95, gt=0.0, lt=1.0)
    max_failed_share: Share = Field(0.05, description="Samples without a verdict, above which the stage stops.")
    every: int = Field(0, ge=0, description="Also evaluate every n-th round; 0: only warm start and final policy.")
    checkpoint: Literal["last", "best"] | Annotated[int, Field(ge=0)] = Field(
        "last",
        description="Which policy is the final one, for all benchmarks: of the last round, of round n, or the best.",
    )
    choose_on: str | None = Field(
        None, description="checkpoint best: the benchmark whose avg@k chooses among the evaluated rounds."
    )

    @model_validator(mode="after")
    def _sampled(self) -> EvaluateParams:
        if self.temperature == 0.0 and self.samples_per_problem > 1:
            raise ValueError(f"temperature 0 with samples_per_problem {self.samples_per_problem} repeats one sample")
        return self

    @model_validator(mode="after")
    def _chosen(self) -> EvaluateParams:
        if (self.checkpoint == "best") != (self.choose_on is not None):
            raise ValueError(
                "checkpoint best and choose_on belong together: name the benchmark that chooses, or neither"
            )
        if self.checkpoint == "best" and not self.every:
            raise ValueError("checkpoint best has one policy to choose from: set every, the rounds that are evaluated")
        if self.choose_on is not None and self.choose_on not in self.benchmarks:
            raise ValueError(f"choose_on {self.choose_on} is none of benchmarks, {', '.join(self.benchmarks)}")
        return self


class ReportParams(_Section):
    """The static page."""

    title: str = "PAPO"
    gallery: int = Field(5, ge=0, le=50, description="Problems of the last round whose responses are shown in full.")


class AlarmsParams(_Section):
    """Where the alarms on the signals ring; `papo.core.alarms.Limits` says what each means."""

    window: Positive = 8
    patience: Positive = 3
    exhausted_share: Share = 0.6
    score_lead: float = Field(0.05, gt=0.0)
    outcome_alignment: float = 0.4
    accuracy_drop: Share = 0.35
    accuracy_noise: Share = 0.05
    length_growth: float = Field(1.6, gt=1.0)
    judge_failure_share: Share = 0.1
    logprob_difference: float = Field(0.05, gt=0.0)
    inversion_share: Share = 0.05
    broken_steps: Positive = 1


Policy = Literal["warn", "pause", "stop"]


class OnAlarmParams(_Section):
    """What a run does when an alarm begins to ring: says it, asks a person whether to go on, or stops. Changes no result."""

    reward_hacking: Policy = "warn"
    length_inflation: Policy = "warn"
    collapse: Policy = "warn"
    signal_exhaustion: Policy = "warn"
    judge_outage: Policy = Field(
        "warn", description="Also where the judge does not answer and score_prm cannot finish."
    )
    logprob_mismatch: Policy = "warn"
    rank_inversions: Policy = "warn"
    non_finite_loss: Policy = Field("warn", description="Also where train.max_broken_steps ends the stage.")
    wait_hours: float = Field(
        24.0, gt=0.0, le=24 * 365, description="How long a paused flow run waits before it stops."
    )

    def of(self, alarm: str) -> Policy:
        policy: Policy = getattr(self, alarm)
        return policy


class TrackingParams(_Section):
    """Where the record goes. Never part of a stage's identity: tracking changes no result."""

    enabled: bool = True
    uri: ProjectPath = "sqlite:///mlflow.db"
    uri_env: str | None = Field(
        None,
        pattern=r"^[A-Z_][A-Z0-9_]*$",
        description="Environment variable with the address, in place of uri: for one that has a password in it.",
    )
    experiment: str = "papo"
    judge_traces: Share = Field(
        0.01, description="Share of a model judge's calls that are kept as traces, at most 100 a round."
    )


class Params(_Section):
    """All sections; see params.yaml."""

    run: RunParams = RunParams()
    prepare: PrepareParams = PrepareParams()
    warmstart: WarmstartParams = WarmstartParams()
    rollout: RolloutParams = RolloutParams()
    score_orm: ScoreOrmParams = ScoreOrmParams()
    score_prm: ScorePrmParams = ScorePrmParams()
    advantage: AdvantageParams = AdvantageParams()
    train: TrainParams = TrainParams()
    evaluate: EvaluateParams = EvaluateParams()
    report: ReportParams = ReportParams()
    alarms: AlarmsParams = AlarmsParams()
    on_alarm: OnAlarmParams = OnAlarmParams()
    tracking: TrackingParams = TrackingParams()
    flow: FlowParams = FlowParams()

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if self.rollout.prompts_per_round % self.train.minibatch_prompts:
            raise ValueError(
                f"rollout.prompts_per_round ({self.rollout.prompts_per_round}) must be a multiple of "
                f"train.minibatch_prompts ({self.train.minibatch_prompts})"
            )
        overlong, limit = self.advantage.overlong, self.rollout.max_new_tokens
        if overlong is not None and overlong.buffer >= limit:
            raise ValueError(
                f"advantage.overlong.buffer ({overlong.buffer}) must be below rollout.max_new_tokens ({limit}), of which it is the end"
            )
        if not self.warmstart.trust_code:
            for section, text in self.rollout.commands.items():
                if "trust-remote-code" in text.replace("_", "-").lower():
                    raise ValueError(
                        f"rollout.{section}: code of a checkpoint runs only if warmstart.trust_code names it"
                    )
        made = self.benchmarks_made
        for name in self.evaluate.benchmarks:
            if name not in made:
                hint = "; add it to prepare.eval_sources" if name in defined_benchmarks() else ""
                made_by = f"is not made by prepare, which makes {', '.join(made)}"
                raise ValueError(f"evaluate.benchmarks: {name} {made_by}{hint}")
        if isinstance(self.evaluate.checkpoint, int) and self.evaluate.checkpoint >= self.run.rounds:
            raise ValueError(
                f"evaluate.checkpoint: there is no round {self.evaluate.checkpoint}, run.rounds is {self.run.rounds}"
            )
        return self

    @property
    def benchmarks_made(self) -> list[str]:
        """Names of those that prepare makes."""
        held_out = ["holdout"] if self.prepare.holdout and self.prepare.source not in GENERATED else []
        return [*self.prepare.generated, *self.prepare.eval_sources, *held_out]

    @property
    def evaluated_rounds(self) -> list[int]:
        """Rounds whose policies are evaluated: every `evaluate.every`-th, and the last or the one that `evaluate.checkpoint` names."""
        last, every = self.run.rounds - 1, self.evaluate.every
        chosen = self.evaluate.checkpoint if isinstance(self.evaluate.checkpoint, int) else last
        return sorted({*(range(every - 1, last, every) if every else ()), chosen})

    def metric(self, benchmark: str) -> Metric:
        """What the benchmark is summed up by."""
        source = self.prepare.eval_sources.get(benchmark)
        return source.metric if source is not None else "avg_at_k"

    def flat(self) -> dict[str, Any]:
        """`section.key` -> value, as MLflow and `papo params` show them."""
        return dict(_flatten(self.model_dump(mode="json")))


def load_params(
    base: Path | None = Path("params.yaml"), *, preset: Path | str | None = None, overrides: Sequence[str] = ()
) -> Params:
    """Reads `base`, lays the preset and then the `key=value` overrides over it, and validates the result.

    Args:
        base: the params file; None starts from the defaults of the models.
        preset: a YAML file, or the name of one under infra/presets.
        overrides: `section.key=value`; the value is read as YAML.

    Raises:
        ParamsError: naming the file or the override, the key, the bound, and the nearest valid key.
    """
    values: dict[str, Any] = _read(base) if base is not None else {}
    origin = str(base) if base is not None else "defaults"
    if preset is not None:
        path = _preset_path(preset)
        values = _merge(values, _read(path))
        origin = f"{origin} + {path}"
    for override in overrides:
        values = _merge(values, _parse_override(override))
    if overrides:
        # Only the keys: a value may be a secret.
        origin = f"{origin} + --set {' '.join(override.partition('=')[0] for override in overrides)}"
    return validate_params(values, origin=origin)


def validate_params(values: Mapping[str, Any], *, origin: str) -> Params:
    """`Params` of a mapping; every problem in it is named in one ParamsError, a secret without its value."""
    if secrets := list(secrets_of(values)):
        raise ParamsError(
            "the params hold what looks like a secret:\n" + "\n".join(f"  - {key}: {what}" for key, what in secrets),
            where=without_secrets(origin),
            fix="take it out and, if it is real, make a new one: params go into dvc.lock, manifests and the record. A key belongs in an "
            "environment variable, which api_key_env names; an address of MLflow with a password in one that tracking.uri_env names; "
            "a command may say $NAME",
        )
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        problems = [_problem(item, values) for item in error.errors(include_url=False)]
        raise ParamsError(
            "the params are not valid:\n" + "\n".join(f"  - {problem}" for problem in problems),
            where=without_secrets(origin),
            fix="correct the keys named above; `papo params` prints every key with its value",
        ) from None


def with_values(params: Params, values: Mapping[str, Any]) -> Params:
    """The params with other values laid over them, as a preset is.

    Raises:
        ParamsError: as `load_params`.
    """
    return validate_params(_merge(params.model_dump(), values), origin="the command's own options")


def _problem(item: Any, values: Mapping[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        siblings = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], siblings, n=1)
        hint = f"did you mean {'.'.join([*location[:-1], close[0]])}?" if close else f"known: {', '.join(siblings)}"
        return f"{key}: no such key; {hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error" and isinstance(item["input"], Mapping | BaseModel):
        return f"{key}: {message}" if key else message
    return f"{key}: {message[:1].lower()}{message[1:]}, got {item['input']!r}"


def _known_keys(location: Sequence[str]) -> list[str]:
    model: type[BaseModel] | None = Params
    for part in location:
        field = model.model_fields.get(part) if model is not None else None
        annotation = field.annotation if field is not None else None
        either = (annotation, *get_args(annotation))  # a section that may be null
        model = next((one for one in either if isinstance(one, type) and issubclass(one, BaseModel)), None)
    return list(model.model_fields) if model is not None else []


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(
            "there is no such params file", where=str(path), fix="run papo in the project's folder, or name the file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"not readable as YAML: {error}", where=str(path), fix="correct the file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ParamsError(
            f"holds a {type(content).__name__}, not sections with keys", where=str(path), fix="see params.yaml"
        )
    return content


def _preset_path(preset: Path | str) -> Path:
    path = Path(preset)
    if path.exists():
        return path
    named = PRESETS / f"{preset}.yaml"
    if named.exists():
        return named
    known = sorted(item.stem for item in PRESETS.glob("*.yaml"))
    raise ParamsError(
        f"there is no preset {str(preset)!r}",
        where="--preset",
        fix=f"name a YAML file or one of: {', '.join(known) or 'none in ' + str(PRESETS)}",
    )


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not all(part.strip() for part in key.split(".")):
        shown = without_secrets(override)
        raise ParamsError(f"not of the form key=value: {shown!r}", where="--set", fix="e.g. --set advantage.lam=0.5")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        what = "" if secret_in(text) else f": {error}"
        raise ParamsError(f"the value is not readable as YAML{what}", where=f"--set {key}", fix="quote it") from None
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return dict(value)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_json(model: BaseModel) -> str:
    """The canonical JSON of a section: sorted keys, no spaces; what fingerprints are made of."""
    return json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
