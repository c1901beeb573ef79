"""One run as a job: on Ray, held by one process, tracked and shown."""
