"""Both planes over HTTP: one route table, strict bodies, one form of error."""
