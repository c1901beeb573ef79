"""One file per verb, run as `landmarks VERB`, or as `python -m jobs.VERB`, which `ray job submit` takes."""
