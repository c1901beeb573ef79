"""One file per verb, each run as `python -m jobs.VERB`, by hand or through `ray job submit`."""
