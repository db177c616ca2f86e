"""HTTP: DICOMweb (PS3.18) and health. Thin: parse, ask the services that DIMSE asks, answer."""
