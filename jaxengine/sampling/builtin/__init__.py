"""The transforms that come with the engine, each a few lines of the algebra."""
