"""One-line explanations of MLflow failures, with a remedy."""

import re

from orchestrator.tracking.sinks.sink import redacted

NO_SERVER = ("Connection refused", "Name or service not known", "Max retries exceeded", "timed out", "No route to host")
CREDENTIALS = (
    "give the tracker credentials: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in "
    "the environment that the cluster was started in, or ~/.mlflow/credentials on its head"
)


def explain(error: Exception, uri: str) -> str:
    """An explanation of a tracker's failure, with passwords redacted."""
    shown = redacted(uri)
    text = redacted(str(error).replace(uri, shown))
    for known in (_of_a_database(text, shown), _of_a_server(text, shown) if uri.startswith("http") else ""):
        if known:
            return known
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    of_the_database = [line for line in lines if re.match(r"\(\w+\.[\w.]*Error\)", line)]  # within SQLAlchemy's message
    return f"{type(error).__name__}: {[*of_the_database, *lines, ''][0]}"


def _of_a_database(text: str, shown: str) -> str:
    if match := re.search(r"out-of-date database schema \(found version (\w+), but expected (\w+)\)", text):
        found, wanted = match.groups()
        return (
            f"the database of {shown} has MLflow's schema {found}, this version needs {wanted}: back it up, then run "
            f"`mlflow db upgrade {shown}`"
        )
    if "Can't locate revision" in text:
        return f"the database of {shown} was made by a newer MLflow: update this one"
    if match := re.search(r"(?:FATAL:\s*)(.+)", text):
        return f"PostgreSQL at {shown} refused us: {match[1].strip()}; set PGPASSWORD, or ~/.pgpass on the head"
    if "psycopg2" in text and "Connection refused" in text:
        return f"no PostgreSQL answers at {shown}: start it, or correct tracking.uri"
    if "No module named 'psycopg2'" in text:
        return f"{shown} needs psycopg2: `pip install psycopg2-binary`, or our extra `postgres`, on the head"
    return ""


def _of_a_server(text: str, shown: str) -> str:
    code = re.search(r"error code (\d{3})|(\d{3}) (?:Client|Server) Error", text)
    status = code and (code[1] or code[2])
    if status == "401" or "UNAUTHENTICATED" in text:
        return f"the MLflow server at {shown} doesn't know us: {CREDENTIALS}"
    if status == "403" or "PERMISSION_DENIED" in text:
        return f"the MLflow server at {shown} doesn't allow us this: {_said(text)}"
    if any(sign in text for sign in NO_SERVER):
        return f"no MLflow server answers at {shown}: start it, or correct tracking.uri"
    if status in ("404", "405", "501") or "not in a valid JSON format" in text or "Expecting value" in text:
        return f"what answers at {shown} is no MLflow server: correct tracking.uri"
    return ""


def _said(text: str) -> str:
    return text.partition("Response body: ")[2].strip().strip("'") or text.splitlines()[0]
