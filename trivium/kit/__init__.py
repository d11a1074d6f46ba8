"""Files, fingerprints, metrics log, errors, the machine and its processes: what every floor above stands on."""
