"""Scoring on a Ray cluster: each chunk of responses is a task of the flow run, which Prefect's Ray task runner hands out.

A worker or node that dies costs nothing but time: Ray has its chunks done again elsewhere, and Prefect is told of one run of each.
"""

from __future__ import annotations

import logging
import os
import pickle
import platform
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

import flows
import papo
from papo.console import warn
from papo.errors import PapoError, ServerDownError, SetupError, StageError
from papo.params import RayParams

if TYPE_CHECKING:
    from prefect_ray import RayTaskRunner

P = TypeVar("P")
R = TypeVar("R")

RETRIES = 10
"""How often a chunk is done again whose worker or node died, before it is taken for the cause."""

PROBE_S = 300.0
"""For every node to import what scoring takes; a first worker process may take half a minute."""

SAME = ("math-verify", "latex2sympy2_extended", "sympy", "prefect", "prefect-ray", "ray")
"""Packages whose version has to be the same on every node."""


@contextmanager
def open_spread(params: RayParams | None) -> Iterator[RaySpread | None]:
    """What scores on the cluster of the params, which has been found to be able to; None: there is no cluster.

    Called within a flow run, which the chunks are tasks of.

    Raises:
        ServerDownError: nothing answers at the address.
        SetupError: Ray is not installed, or the cluster is not like this machine.
    """
    if params is None:
        yield None
        return
    # Nobody is told of it, and a machine without a GPU is not asked for one with every task.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise SetupError("run.ray needs Ray", where="run.ray", fix="pip install 'papo[ray]'") from None
    ours = not ray.is_initialized()
    try:
        if ours:
            _connect(params.address)
        _check_nodes(params.address)
        with RayTaskRunner() as runner:  # takes the connection that there is
            yield RaySpread(params.chunk, runner, copy_context())
    finally:
        if ours:
            ray.shutdown()


class RaySpread:
    """Implements `Spread` by a runner whose connection is open.

    Args:
        context: of the flow run: its id and settings go with each task.
    """

    def __init__(self, chunk: int, runner: RayTaskRunner[Any], context: Context) -> None:
        self.chunk = chunk
        self._runner, self._context = runner, context

    def map(self, name: str, work: Callable[[P], R], pieces: Sequence[P], *, cpus: int) -> Iterator[R]:
        """Twice as many tasks as there are places for are under way, so that none waits and memory is bounded."""
        import ray

        waiting: deque[Any] = deque()
        try:
            limit = 2 * max(1, int(_resources().get("CPU", 1.0) / cpus))
            for number, piece in enumerate(pieces):
                job = pickle.dumps((work, piece))  # bytes: Prefect looks for futures within anything else
                waiting.append(self._inside(self._submit, {"name": name, "number": number, "job": job}, cpus))
                if len(waiting) > limit:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        finally:
            for future in waiting:  # after an error, or when nobody wants the rest
                ray.cancel(future.wrapped_future)

    def _inside(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Calls within the flow run: the caller may be a thread, or a task whose parameters cannot be sent anywhere."""
        return self._context.copy().run(call, *arguments)

    def _submit(self, parameters: dict[str, Any], cpus: int) -> Any:
        from prefect_ray.context import remote_options

        # A server that this process has started for itself is in no setting; without one, every worker would start its own.
        url = PREFECT_API_URL.value() or str(get_client(sync_client=True).api_url)
        with temporary_settings({PREFECT_API_URL: url}), remote_options(num_cpus=cpus, max_retries=RETRIES):
            return self._runner.submit(score_chunk, parameters)

    def _result(self, future: Any) -> Any:
        from ray import exceptions

        try:
            return self._inside(future.result)
        except PapoError:
            raise
        except exceptions.RuntimeEnvSetupError as error:
            raise SetupError(
                f"a node could not take papo's code: {_brief(error)}",
                where="run.ray",
                fix="see runtime_env_setup-*.log of the node under /tmp/ray/session_latest/logs",
            ) from None
        except exceptions.RayTaskError as error:
            raise SetupError(
                f"a node could not score: {_brief(error)}",
                where="run.ray",
                fix="install the same requirements.lock on every node",
            ) from None
        except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError) as error:
            raise StageError(
                f"a chunk ended its worker {RETRIES + 1} times: {_brief(error)}",
                where="run.ray",
                fix="give the nodes more memory, or lower run.ray.chunk; the same command goes on from the stage",
            ) from None
        except (exceptions.RayError, ConnectionError) as error:
            raise ServerDownError(
                f"the Ray cluster is gone: {_brief(error)}",
                where="run.ray.address",
                fix="start it again; the same command goes on from the stage",
            ) from None


@task(name="score", task_run_name="{name} {number}", cache_policy=NO_CACHE, persist_result=False, retries=0)
def score_chunk(name: str, number: int, job: bytes) -> Any:
    """One chunk, on a node: Ray starts it again if its worker dies, and an error of papo would only come again."""
    work, piece = pickle.loads(job)  # of the run's own process
    return work(piece)


def _connect(address: str) -> None:
    """Connects this process; papo's own code goes to every node with it, so that all run the same."""
    import ray

    if ":" in address:
        _check_reachable(address)
    given: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    code = [str(Path(str(module.__file__)).parent) for module in (papo, flows)]
    main = threading.current_thread() is threading.main_thread()
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address, namespace="papo", runtime_env={"py_modules": code}, log_to_driver=False, logging_level=logging.WARNING,
            **given,
        )  # fmt: skip
    except ConnectionError as error:
        raise ServerDownError(
            f"there is no Ray cluster to connect to: {_brief(error)}", where=_where(address), fix=_START
        ) from None
    except (RuntimeError, ray.exceptions.RayError) as error:  # versions that differ, a token that is refused
        raise SetupError(
            f"the Ray cluster does not take this machine: {_brief(error)}",
            where=_where(address),
            fix="use the same Python and the same requirements.lock as the cluster, and its token (RAY_AUTH_TOKEN_PATH)",
        ) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, on_term)  # Ray's own would end a flow without its end being recorded


_START = (
    "start its head with `ray start --head` and the others with `ray start --address=HOST:6379`, correct the address, or take "
    "--set run.ray=null, which scores in the run's own process"
)


def _where(address: str) -> str:
    return f"run.ray.address = {address}"


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
    except (OSError, OverflowError) as error:
        raise ServerDownError(f"no Ray head answers: {error}", where=_where(address), fix=_START) from None


def _check_nodes(address: str) -> None:
    """Asks every node, before hours of work, whether it can score, and as this machine would.

    Raises:
        SetupError: naming the node, and what it lacks or has another version of.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = _machine()
    nodes = [node for node in _nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    if not nodes:
        raise SetupError("no node of the Ray cluster has a CPU to score with", where=_where(address), fix=_START)
    ask = ray.remote(num_cpus=0, max_retries=2)(_machine)
    asked = {
        node["NodeManagerAddress"]: ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in nodes
    }
    for name, answer in asked.items():
        try:
            there = ray.get(answer, timeout=PROBE_S)
        except (ray.exceptions.RayError, ImportError) as error:
            raise SetupError(
                f"the node {name} cannot score: {_brief(error)}",
                where=_where(address),
                fix="install requirements.lock there, and start Ray from that environment",
            ) from None
        if differ := [part for part in here if here[part] != there[part]]:
            listed = ", ".join(f"{part} {there[part]} for {here[part]}" for part in differ)
            raise SetupError(
                f"the node {name} has {listed}",
                where=_where(address),
                fix="install the same requirements.lock on every node",
            )
    api = PREFECT_API_URL.value() or "http://127.0.0.1"
    if len(nodes) > 1 and any(name in api for name in ("//127.", "//localhost", "//[::1]")):
        warn(
            "the other nodes cannot tell Prefect of the chunks that they score: its address is that of this machine alone"
        )


def _resources() -> dict[str, float]:
    import ray

    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]  # Ray's own has no types


def _nodes() -> list[dict[str, Any]]:
    import ray

    return list(ray.nodes())  # type: ignore[no-untyped-call]  # Ray's own has no types


def _machine() -> dict[str, str]:
    """Versions that scores depend on; runs on each node, which shows that it can import what scoring takes."""
    for name in ("papo.engines.fan_out", "papo.engines.judges", "papo.engines.verifiers.by_kind", "math_verify"):
        import_module(name)
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in SAME}}


def _brief(error: BaseException) -> str:
    """The last line of what Ray says, which is what is wrong; the rest is where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
