"""SPHERE, a research PACS: DICOM in, bundles on HDFS, a Delta Lake catalog, DIMSE and Spark SQL out."""

__version__ = "0.1.0"
