"""The steps of curation, one file each: a step in this folder can be named in `steps:`."""
