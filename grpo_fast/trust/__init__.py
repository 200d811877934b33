"""Can a reward model be trusted: measures, calibration, exploit probes, distance from what it was trained on."""
