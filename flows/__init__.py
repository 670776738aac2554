"""The flows: when and where the pipeline runs, and what a person sees of it meanwhile. No logic.

Prefect reads its settings when it is imported, so the defaults below are set before that. Without PREFECT_API_URL, Prefect starts a
server of its own for as long as a run takes; on a busy machine that takes longer than the 20 seconds that Prefect allows.
"""

import os

from papo.cli import quiet_environment

quiet_environment()
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_ENABLED", "true")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
