"""Run by Spark's own Python: reads Parquet files and prints, as JSON, what it found."""

import json
import sys

from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as f


def main(folder: str) -> None:
    asked = json.load(sys.stdin)
    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    places = {"spark.local.dir": folder, "spark.sql.warehouse.dir": f"{folder}/warehouse"}
    spark = builder.config(map=places).getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    found = {version: _read(spark, paths, asked) for version, paths in asked["paths"].items()}
    print(json.dumps({"spark": spark.version, "versions": found}))
    spark.stop()


def _read(spark: SparkSession, paths: list[str], asked: dict) -> dict:
    frame = spark.read.parquet(*paths)
    rows = frame.select(*asked["fields"]).orderBy("uri").collect()
    (sums,) = frame.select(
        f.count("*").alias("rows"),
        f.sum(f.size("acoustic")).alias("codes"),
        f.sum(f.aggregate("acoustic", f.lit(0), lambda a, b: a + b)).alias("sum_of_codes"),
    ).collect()
    return {
        "rows": [row.asDict(recursive=True) for row in rows],
        "schema": {field.name: field.dataType.simpleString() for field in frame.schema},
        "sums": sums.asDict() if isinstance(sums, Row) else {},
    }


main(sys.argv[1])
