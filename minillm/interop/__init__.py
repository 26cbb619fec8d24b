"""Other projects' formats. Their names live here alone; third parties are imported inside functions."""
