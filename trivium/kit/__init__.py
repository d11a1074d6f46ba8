"""Files, fingerprints, metrics, errors, the machine and its processes: what every floor stands on."""
