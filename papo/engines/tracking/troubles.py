"""Why MLflow did not take a record, and what a person can do about it."""

from __future__ import annotations

import errno
import re

from papo.secrets import without_secrets

PASSES = ("locked",)
"""Troubles that another try within seconds may mend, and of which nothing is said at first."""
REFUSED = "refused"


class DeliveryError(Exception):
    """A record was not delivered.

    Args:
        kind: "down", "locked", "credentials", "schema", "experiment", "disk", "uri" or "import": nothing can be delivered until that
            is mended; "shaky": it may be taken at another try; "refused": this record was not taken, the others are.
        what: one line, without a password.
        fix: what to do; may be empty.
    """

    def __init__(self, kind: str, what: str, fix: str = "") -> None:
        self.kind, self.what, self.fix = kind, what, fix
        super().__init__(f"{what}; {fix}" if fix else what)


def trouble(error: BaseException, *, uri: str, experiment: str) -> DeliveryError:
    """What an error of MLflow, of its server or of its database means for the record.

    Args:
        uri: where MLflow is; a password in it does not get into the message.
    """
    if isinstance(error, DeliveryError):
        return error
    where, text = without_password(uri), _whole_text(error)
    brief = brief_of(error)
    for kind, pattern, what, fix in _KNOWN:
        if found := re.search(pattern, text):
            names = {"uri": where, "experiment": experiment, "brief": brief, "found": found[0]}
            return DeliveryError(kind, what.format(**names), fix.format(**names))
    if _status(text) >= 500 or _number(error) in _GONE or re.search(_DOWN, text):
        return DeliveryError("down", f"MLflow is unreachable at {where}: {brief}", _START.format(uri=where))
    return DeliveryError(REFUSED, brief)


def without_password(text: str) -> str:
    """`text` without what stands between `//` and `@` in a URI, the passwords and tokens of its query, and what looks like a secret."""
    text = re.sub(r"//[^/@\s]*@", "//***@", text)
    return without_secrets(re.sub(r"(?i)([?&](?:password|passwd|pwd|token|secret|api_key)=)[^&\s'\"]*", r"\1***", text))


def brief_of(error: BaseException) -> str:
    """One line: what the system said, where the chain of errors leads to that, else the error's own words."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            error = cause
    line = " ".join(str(error).split()) or type(error).__name__
    return without_password(line if len(line) <= 300 else f"{line[:297]}...")


_LOGIN = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) in the environment, "
    "then `papo track sync`"
)
_START = "see whether it runs there and whether tracking.uri is right; `papo track sync` delivers what waits"
_RESTORE = (
    "restore it with `mlflow experiments restore`, or name another with `--set tracking.experiment=NAME`, "
    "for what waits with `papo track sync --experiment NAME`"
)

# The first that fits counts: (kind, pattern in what the chain of errors says, message, what to do).
_KNOWN = (
    (
        "schema",
        r"Can't locate revision|newer than",
        "the MLflow database {uri} was made by a later MLflow than this one",
        "update MLflow here to the version that made it; `mlflow db upgrade` of the older one cannot help",
    ),
    (
        "schema",
        r"out-of-date database schema|no such column|UndefinedColumn",
        "the MLflow database has the schema of another version: {brief}",
        "back it up, then run `mlflow db upgrade URI` with the MLflow that reads it, for example `mlflow db upgrade {uri}`; "
        "if it was made by a later MLflow, update MLflow instead",
    ),
    (
        "locked",
        r"database is locked|database table is locked|deadlock detected|TEMPORARILY_UNAVAILABLE|DeadlockDetected"
        r"|could not serialize|too many clients|remaining connection slots|QueuePool limit",
        "MLflow's database at {uri} is busy: {brief}",
        "others write to it at the same time; it is tried again",
    ),
    (
        "shaky",
        r"IntegrityError|UNIQUE constraint failed|duplicate key|StaleDataError",
        "{brief}",
        "",
    ),
    (
        "disk",
        r"readonly database|read-only|attempt to write a readonly",
        "the MLflow database {uri} cannot be written: {brief}",
        "check the permissions of the file and its folder, then `papo track sync`",
    ),
    (
        "disk",
        r"database or disk is full|No space left on device|disk I/O error|Disk quota exceeded",
        "MLflow's disk is full at {uri}: {brief}",
        "free space, then `papo track sync`",
    ),
    (
        "disk",
        r"file is not a database|database disk image is malformed",
        "{uri} is no MLflow database: {brief}",
        "restore it, or name another with tracking.uri; `papo track sync --to URI` delivers what waits there",
    ),
    (
        "disk",
        r"unable to open database file",
        "the MLflow database {uri} cannot be opened: {brief}",
        "check that its folder is there and can be written, then `papo track sync`",
    ),
    (
        "credentials",
        r"error code 401|You are not authenticated|Unauthorized",
        "MLflow at {uri} does not know who asks (401): user or password are missing or wrong",
        _LOGIN,
    ),
    (
        "credentials",
        r"error code 403|Permission denied(?! *:)|PERMISSION_DENIED|Forbidden",
        "MLflow at {uri} does not allow this user to write experiment {experiment} (403)",
        f"have an administrator grant EDIT on it, or act as another user: {_LOGIN}",
    ),
    (
        "credentials",
        r"password authentication failed|no password supplied|Access denied for user|role \".*\" does not exist",
        "the database of MLflow at {uri} refuses user or password",
        "correct them in tracking.uri, or in MLFLOW_TRACKING_URI for `papo track sync`",
    ),
    (
        "experiment",
        r"must be in the 'active' state|is deleted|deleted state|non-active experiment",
        "experiment {experiment} has been deleted in MLflow at {uri}",
        _RESTORE,
    ),
    (
        "uri",
        r"unsupported URI|UnsupportedModelRegistryStoreURI|Can't load plugin: sqlalchemy|Could not parse SQLAlchemy URL"
        r"|No connection adapters|Invalid URL|Failed to parse|maintenance mode|file store",
        "tracking.uri is {uri}, which MLflow cannot use: {brief}",
        "use http://HOST:PORT, https://HOST, sqlite:///FILE or postgresql://USER@HOST/NAME; "
        "`papo track sync --to URI` delivers what waits there",
    ),
    (
        "import",
        r"No module named '(psycopg2|pymysql|MySQLdb|boto3|pyodbc)",
        "MLflow needs a package for {uri} that is not installed: {found}'",
        "install it, then `papo track sync`",
    ),
)
_DOWN = (
    r"Max retries exceeded|Connection refused|Connection reset|timed out|Timeout|ConnectionError|server closed the connection|"
    r"could not translate host name|Remote end closed|Connection aborted|the database system is (starting up|shutting down)"
)
_GONE = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, -2, -3, -5,
}  # fmt: skip


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what led to it."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found


def _whole_text(error: BaseException) -> str:
    """What all errors of the chain say, with their names."""
    codes = [(cause, getattr(cause, "error_code", "")) for cause in _chain(error)]
    return "\n".join(f"{type(cause).__name__} {code if isinstance(code, str) else ''} {cause}" for cause, code in codes)


def _status(text: str) -> int:
    found = re.search(r"error code (\d{3})\b", text)
    return int(found[1]) if found else 500 if re.search(r"too many \d+ error responses", text) else 0


def _number(error: BaseException) -> int | None:
    numbers = (cause.errno for cause in _chain(error) if isinstance(cause, OSError) and cause.errno is not None)
    return next(numbers, None)
