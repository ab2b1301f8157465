"""Models of the library `transformers`, with their experts spread over ranks (`model.impl: transformers`)."""
