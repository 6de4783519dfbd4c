"""Verbs with a module each: a function of the verb's name, and `arguments(parser)`. Like saih.cli they may print."""
