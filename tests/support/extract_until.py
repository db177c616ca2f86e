"""An extraction that ends with SIGKILL: ``python -m tests.support.extract_until SETTINGS_JSON STEP CALL SPARK``.

It kills itself when `on_step` is called for the CALLth time with the name STEP. SPARK is "own", a session whose JVM
goes with it, or "shared", the JVM of the process that started it (`environment`), which is there at once and stays.
"""

from __future__ import annotations

import sys

from pyspark import SparkConf, SparkContext
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from sphere.conf.settings import Settings
from sphere.jobs.extract import run
from sphere.jobs.session import spark_session
from tests.support.dying import killed_at


def main() -> None:
    """Run, and die on the way."""
    settings = Settings.model_validate_json(sys.argv[1])
    on_step = killed_at(sys.argv[2], int(sys.argv[3]))
    own = sys.argv[4] == "own"
    run(spark_session(settings, app_name="extract until") if own else attached(), settings, on_step=on_step)


def environment(spark: SparkSession) -> dict[str, str]:
    """What a process needs to be another driver of this session's JVM."""
    gateway = spark.sparkContext._gateway.gateway_parameters  # type: ignore[union-attr]  there is one
    return {"PYSPARK_GATEWAY_PORT": str(gateway.port), "PYSPARK_GATEWAY_SECRET": gateway.auth_token}


def attached() -> SparkSession:
    """A session in the JVM that `environment` tells of."""
    gateway = launch_gateway()  # it launches none where the environment has one
    spark = gateway.jvm.org.apache.spark
    context = spark.api.java.JavaSparkContext(spark.SparkContext.getOrCreate())
    return SparkSession(SparkContext(gateway=gateway, jsc=context, conf=SparkConf(_jconf=context.getConf())))


if __name__ == "__main__":
    main()
