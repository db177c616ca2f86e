"""What a statement of Spark SQL does, told before anything of it is done: `sphere sql` and `archive.sql` only ask."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from py4j.java_gateway import is_instance_of
from pyspark.sql import SparkSession

from sphere.conf.errors import StatementError

COMMAND: Final = "org.apache.spark.sql.catalyst.plans.logical.Command"
"""What Spark runs for its effect. Asking for one as a data frame does it at once."""

ASKS: Final = re.compile(r"(Describe|Show|Explain)\w*")
"""Commands that change nothing, and whose rows are an answer."""

ACTS: Final = re.compile(r"\w*Statement|InsertIntoDir|\w*ExecuteImmediate\w*|Call")
"""Plans that do something and are no Command: INSERT, RESTORE and CLONE of Delta, EXECUTE IMMEDIATE, CALL."""


def check_asks(spark: SparkSession, statement: str) -> None:
    """Raise StatementError for a statement that is no query, wherever it writes, and PySparkException for none at all.

    Views of the tables cannot be written to, but a table can be named by its path as well.
    """
    plan = spark._jsparkSession.sessionState().sqlParser().parsePlan(statement)
    if ASKS.fullmatch(_kind(plan)):
        return
    for node in _nodes(plan):
        kind = _kind(node)
        if ACTS.fullmatch(kind) or is_instance_of(spark.sparkContext._gateway, node, COMMAND):
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.removesuffix("Statement").removesuffix("Command"))
            raise StatementError(
                f"{words.strip().upper()} is no query, and nothing of it was done: "
                "sql takes SELECT, WITH, VALUES, DESCRIBE, SHOW and EXPLAIN"
            )


def _nodes(plan: Any) -> Iterator[Any]:
    yield plan
    children = plan.children()
    for number in range(children.size()):
        yield from _nodes(children.apply(number))


def _kind(plan: Any) -> str:
    return str(plan.getClass().getSimpleName()).rstrip("$")
