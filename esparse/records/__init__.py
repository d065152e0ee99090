"""What a finished run leaves: the record's parts, and the files beside it."""
