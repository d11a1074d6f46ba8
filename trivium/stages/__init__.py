"""One file per kind of stage: the whole field as a list of files."""
