"""Image shards, their decoding and the loader that training reads them with."""
